"""Residual addition and RMSNorm in plain torch: the oracle, and what runs where the kernels cannot.

Legend: D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_norm.reference import gated_norm, gated_norm_backward
from kernels.residual.reference import residual


def add_norm(
    x: Tensor, y: Tensor, scale_D: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(x scale + y, its norm times weight); arguments as of `kernels.add_norm.add_norm`."""
    r = x + y if scale_D is None else residual(x, y, scale_D)
    return r, gated_norm(r, None, weight_D, eps, dtype=dtype)


def norm_beside(x: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(x, its norm times weight)."""
    return x, gated_norm(x, None, weight_D, eps, dtype=dtype)


def add_norm_backward(
    d_r: Tensor, d_n: Tensor, r: Tensor, x: Tensor | None, scale_D: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, scale (empty without one) and weight, in fp32 (fp64)."""
    inner = torch.promote_types(r.dtype, torch.float32)
    d_norm, _, d_weight = gated_norm_backward(d_n, r, None, weight_D, eps, 1, False)
    d = d_r.to(inner) + d_norm
    if scale_D is None or x is None:
        return d, d, d.new_empty(0), d_weight
    return d * scale_D.to(inner), d, (d * x.to(inner)).flatten(0, -2).sum(0), d_weight
