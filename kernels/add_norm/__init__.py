"""add_norm: the residual stream after a sublayer, and its RMSNorm for the next one, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.add_norm import op, reference


def add_norm(
    x: Tensor, y: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(r, rms(r) weight) with r = x scale + y (x + y without a scale), for x and y (..., D) of one shape: r in the wider of their dtypes, the
    norm in `dtype` (r's if None), fp32 inside (fp64 for fp64). Differentiable in all of x, y, scale and weight, through both results."""
    if op.use_triton(x, y):
        return op.add_norm(x, y, scale_D, weight_D, eps, dtype or torch.promote_types(x.dtype, y.dtype))
    return reference.add_norm(x, y, scale_D, weight_D, eps, dtype)


def norm_beside(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(x, rms(x) weight) of a stream (..., D) that has nothing added yet; what reads the first needs no sum of gradients of its own."""
    if op.use_triton(x, x):
        return op.norm_beside(x, weight_D, eps, dtype or x.dtype)
    return reference.norm_beside(x, weight_D, eps, dtype)
