"""The op everywhen::gated_norm. Saved for backward are the inputs.

Legend: D width.
"""

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.gated_norm import reference
from kernels.op import define

WIDEST = 16384  # channels of a group that the registers of a program hold


def use_triton(h: Tensor, groups: int) -> bool:
    return h.dtype != torch.float64 and h.shape[-1] // groups <= WIDEST and not no_triton(h.device)


def _forward(h: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, norm_first: bool, dtype: torch.dtype) -> Tensor:
    """y (..., D) in `dtype`."""
    from kernels.gated_norm import launch

    return launch.norm(h, gate, weight, eps, groups, norm_first, dtype)


def _backward(
    dy: Tensor, h: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, norm_first: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of h, gate and weight, each in the dtype of its tensor."""
    from kernels.gated_norm import launch

    return launch.norm_backward(dy, h, gate, weight, eps, groups, norm_first)


norm, norm_op = define(
    "gated_norm",
    _forward,
    lambda h, gate, weight, eps, groups, norm_first, dtype: h.new_empty(h.shape, dtype=dtype),
    _backward,
    reference=reference.gated_norm,
    reference_backward=lambda *arguments: reference.gated_norm_backward(*arguments[:-1]),
)
