"""Problems for the tests of M2RNN, and the float64 loop's answers to them; used with and without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.m2rnn.reference import m2rnn_sequential

NAMES = ("q", "k", "v", "g", "w", "h0")
LABELS = ("o", "final", *(f"d{n}" for n in NAMES))


def problem(
    B: int,
    T: int,
    H: int,
    V: int,
    G: int,
    K: int,
    *,
    dtype: torch.dtype = torch.float32,
    starts: float = 0.0,
    decay: float = 0.5,
    gain: float = 0.7,
    device: str = "cpu",
) -> tuple[list[Tensor], Tensor | None]:
    """q, k, v, g, w, h0 and starts; q, k and v are parts of one tensor, as in the model. decay: the largest -g. gain: of a weight that is half
    identity and half noise."""
    r = torch.Generator().manual_seed(T * 7 + V)
    joint = torch.randn(B, T, 2 * G * K + H * V, generator=r).to(device, dtype)
    q, k, v = joint.split([G * K, G * K, H * V], -1)
    g, h0 = -decay * torch.rand(B, T, H, generator=r), 0.5 * torch.randn(B, H, K, V, generator=r)
    w = gain * (torch.eye(V) + torch.randn(H, V, V, generator=r) * V**-0.5) / 2
    new = torch.rand(B, T, generator=r) < starts if starts else None
    shaped = [q.unflatten(-1, (G, K)) * K**-0.5, k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V))]
    return [*shaped, *(t.to(device) for t in (g, w, h0))], None if new is None else new.to(device)


def answers(
    rule: Callable[..., Any], tensors: list[Tensor], starts: Tensor | None, do: Tensor, d_final: Tensor, scale: float = 1.0
) -> list[Tensor]:
    """o, final state, and the gradients of NAMES, those of a loss that is `scale` times as large divided by it again."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    o, final = rule(*leaves, starts)
    made = torch.autograd.grad((o, final), leaves, (scale * do.to(o.dtype), scale * d_final.to(final.dtype)))
    return [o.detach(), final.detach(), *(t / scale for t in made)]


def oracle(tensors: list[Tensor], starts: Tensor | None, do: Tensor, d_final: Tensor) -> list[Tensor]:
    return answers(m2rnn_sequential, [t.double() for t in tensors], starts, do.double(), d_final.double())


def asked(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of the outputs and of the final state, drawn from torch's global generator."""
    v, h0 = tensors[2], tensors[5]
    return torch.randn(v.shape, device=v.device).to(v.dtype), torch.randn(h0.shape, device=h0.device)


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9)).item()
