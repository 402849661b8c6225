"""Random problems for the loss of logits, and of a head with its loss.

Legend: D width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import cross_entropy
from models.head import Head
from tests.kernels.generate.answers import Function, compared
from tests.kernels.generate.case import Answers, Draw


def labels_of(draw: Draw, rows: int, V: int) -> Tensor:
    labels = draw.integers(0, V, rows)
    labels[draw.rand(rows) < 0.2] = -100
    return labels.to(draw.device, draw.choice([torch.int64, torch.int32]))


def loss_of_rows(draw: Draw) -> Answers:
    """The loss of logits and its gradient: large and equal logits, infinite ones, rows that do not count and hold NaN."""
    rows, V = draw.size(100, 500, small=(1, 2, 5, 9)), draw.size(127, 8192, 8193, 50257, small=(1, 2, 64, 65, 130))
    dtype = draw.dtype(interpreter=True)
    logits = (draw.choice([1e-8, 1.0, 4.0, 300.0]) * draw.randn(rows, V)).to(dtype).to(draw.device)
    labels = labels_of(draw, rows, V)
    logits[labels == -100] = math.nan
    if draw.chance(0.3) and V > 1:
        other = torch.arange(V, device=draw.device) != labels[:1]
        logits[:1] = torch.where(other, -math.inf, logits[:1])
    g = [draw.randn(rows).to(draw.device) for _ in range(2)]
    counted = labels != -100
    if draw.chance(0.5):
        g = [torch.ones(rows, device=draw.device), torch.zeros(rows, device=draw.device)]
        nll, log_z, d = cross_entropy.losses_and_gradient_(logits.clone(), labels)
    else:
        nll, log_z = cross_entropy.losses(logits, labels)
        d = cross_entropy.gradient_(logits.clone(), labels, log_z, *g)

    def exact(kind: torch.dtype) -> list[Tensor]:
        leaf = logits[counted].to(kind).requires_grad_()
        z = torch.logsumexp(leaf, -1)
        nll_ = z - leaf.gather(1, labels[counted].long()[:, None])[:, 0]
        gradient = torch.autograd.grad((nll_ * g[0][counted].to(kind)).sum() + (z * g[1][counted].to(kind)).sum(), leaf)[0]
        whole = [torch.zeros(rows, dtype=kind, device=leaf.device) for _ in range(2)] + [
            torch.zeros(rows, V, dtype=kind, device=leaf.device)
        ]
        for all_, part in zip(whole, (nll_, z, gradient)):
            all_[counted] = part.detach()
        return whole

    return compared(
        ("nll", "log z", "d logits"), (nll, log_z, d), exact(torch.float64), exact(torch.float32), f"rows {rows}, V {V}, {dtype}", 2.0
    )


def loss_of_head(draw: Draw) -> Answers:
    """The head and its loss in pieces, with rows that do not count."""
    rows, D, V = draw.size(100, 700, small=(0, 1, 2, 5, 9)), draw.size(64, 200), draw.size(127, 8193, small=(2, 64, 65))
    chunk, recompute, summed = draw.choice([1, 3, 2048]), draw.chance(0.6), draw.chance(0.5)
    labels = labels_of(draw, rows, V)
    h = (draw.magnitude(-8, 2) * draw.randn(rows, D)).to(draw.device)
    h[labels == -100] = math.nan
    head = Head(D, V).to(draw.device)
    with torch.no_grad():
        head.weight.copy_(draw.randn(V, D))
    counted, g = labels != -100, [draw.randn(rows).to(draw.device) for _ in range(2)]
    kept = summed and draw.chance(0.6)  # gradients of the sum alone: those that were made with the losses
    scale = draw.choice([1.0, -0.37, 1e-6])

    def weighted(nll: Tensor, log_z: Tensor, kind: torch.dtype) -> Tensor:
        return nll.sum() * scale if kept else (nll * g[0].to(kind)).sum() + (log_z * g[1].to(kind)).sum()

    def run(f: Function, kind: torch.dtype) -> list[Tensor]:
        leaf, weight = h.detach().to(kind).requires_grad_(), head.weight.detach().to(kind).requires_grad_()
        nll, log_z = f(leaf, weight)
        d_h, d_weight = torch.autograd.grad(weighted(nll, log_z, kind), (leaf, weight if f is exact else head.weight))
        return [nll.detach(), log_z.detach(), torch.where(counted[:, None], d_h, 0.0) if f is exact else d_h, d_weight]

    def exact(leaf: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.where(counted[:, None], leaf, 0.0) @ weight.T
        z = torch.logsumexp(logits, -1)
        nll = z - logits.gather(1, labels.clamp(min=0).long()[:, None])[:, 0]
        return torch.where(counted, nll, 0.0), torch.where(counted, z, 0.0)

    computed = run(lambda leaf, _: head(leaf, labels, chunk=chunk, recompute=recompute, summed=summed), torch.float32)
    return compared(
        ("nll", "log z", "d h", "d weight"), computed, run(exact, torch.float64), run(exact, torch.float32),
        f"rows {rows}, D {D}, V {V}, chunk {chunk}, recompute {recompute}, summed {summed}, kept {kept}", 2.0,
    )  # fmt: skip
