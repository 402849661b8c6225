"""Problems for the scan's tests, and the float64 loop's answers to them; used with and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.ssd.reference import ssd_sequential

NAMES = ("x", "dt", "A", "B", "C", "h0", "D")


def problem(
    B: int,
    T: int,
    H: int,
    P: int,
    G: int,
    N: int,
    *,
    dtype: torch.dtype = torch.float32,
    starts: float = 0.0,
    decay: float = 1.0,
    device: str = "cpu",
) -> tuple[list[Tensor], Tensor | None]:
    """x, B and C are parts of one tensor, as in the model. decay: largest dt A; half of the steps decay by a thousandth of that."""
    g = torch.Generator().manual_seed(T * 7 + P)
    joint = torch.randn(B, T, H * P + 2 * G * N, generator=g).to(device, dtype)
    x, b, c = joint.split([H * P, G * N, G * N], -1)
    dt = torch.rand(B, T, H, generator=g) * torch.where(torch.rand(B, T, H, generator=g) < 0.5, 1.0, 1e-3) + 1e-6
    A, D, h0 = -decay * (0.1 + 0.9 * torch.rand(H, generator=g)), torch.randn(H, generator=g), torch.randn(B, H, P, N, generator=g)
    new = torch.rand(B, T, generator=g) < starts if starts else None
    rest = [t.to(device) for t in (dt, A, h0, D)]
    tensors = [x.unflatten(-1, (H, P)), rest[0], rest[1], b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N)), rest[2], rest[3]]
    return tensors, None if new is None else new.to(device)


def answers(scan: Callable[..., Any], tensors: list[Tensor], starts: Tensor | None, dy: Tensor, d_final: Tensor) -> list[Tensor]:
    """y, final state, and the gradients of NAMES."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, final = scan(*leaves[:6], starts, D=leaves[6])
    gradients = torch.autograd.grad((y, final), leaves, (dy.to(y.dtype), d_final.to(final.dtype)))
    return [y.detach(), final.detach(), *gradients]


def oracle(tensors: list[Tensor], starts: Tensor | None, dy: Tensor, d_final: Tensor) -> list[Tensor]:
    return answers(ssd_sequential, [t.double() for t in tensors], starts, dy.double(), d_final.double())


def gap(computed: Tensor, wanted: Tensor) -> float:
    """Largest error relative to the largest value (at least one)."""
    return ((computed.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1)).item()


def distance(computed: Tensor, wanted: Tensor) -> float:
    return ((computed.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)).item()
