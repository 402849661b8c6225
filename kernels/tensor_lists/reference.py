"""The steps of `tensor_lists` in plain torch: the oracle, and what runs where the kernels cannot.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def momentum_and_update(
    gradients: list[Tensor], momentum_krc: Tensor, beta: float, nesterov: bool, side: int, dtype: torch.dtype, divisor: Tensor | None
) -> Tensor:
    g_krc = torch.stack(gradients)
    if divisor is not None:
        g_krc /= divisor
    momentum_krc.lerp_(g_krc, 1 - beta)
    x_krc = g_krc.lerp_(momentum_krc, beta) if nesterov else momentum_krc
    return x_krc.to(dtype).unflatten(2, (side, -1)).transpose(1, 2).flatten(0, 1)


def take_step(weights: list[Tensor], updates: Tensor, keep: float, step: float, side: int) -> None:
    u_krc = updates.unflatten(0, (-1, side)).transpose(1, 2).flatten(2)
    if keep != 1.0:
        torch._foreach_mul_(weights, keep)
    torch._foreach_add_(weights, list(u_krc.to(weights[0].dtype).unbind()), alpha=-step)
