"""The steps of `tensor_lists` in plain torch: the oracle, and what runs where the kernels cannot.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pieces(tensors: list[Tensor], firsts: list[int], shape: tuple[int, int]) -> list[Tensor]:
    """Views of `shape` of the tensors, from element `first` on."""
    rows, columns = shape
    return [t.detach().view(-1)[first : first + rows * columns].view(rows, columns) for t, first in zip(tensors, firsts)]


def momentum_and_update(
    gradients: list[Tensor],
    firsts: list[int],
    momentum_krc: Tensor,
    beta: float,
    nesterov: bool,
    side: int,
    dtype: torch.dtype,
    divisor: Tensor | None,
) -> Tensor:
    g_krc = torch.stack(pieces(gradients, firsts, (momentum_krc.shape[1], momentum_krc.shape[2])))
    if divisor is not None:
        g_krc /= divisor
    momentum_krc.lerp_(g_krc, 1 - beta)
    x_krc = g_krc.lerp_(momentum_krc, beta) if nesterov else momentum_krc
    return x_krc.to(dtype).unflatten(2, (side, -1)).transpose(1, 2).flatten(0, 1)


def take_step(
    weights: list[Tensor], firsts: list[int], shape: tuple[int, int], updates: Tensor, keep: float, step: float, side: int
) -> None:
    u_krc, parts = updates.unflatten(0, (-1, side)).transpose(1, 2).flatten(2), pieces(weights, firsts, shape)
    if keep != 1.0:
        torch._foreach_mul_(parts, keep)
    torch._foreach_add_(parts, list(u_krc.to(weights[0].dtype).unbind()), alpha=-step)
