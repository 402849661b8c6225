"""The scaled residual in plain torch: the oracle, and what runs where the kernels cannot.

Legend: D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residual(x: Tensor, y: Tensor, scale_D: Tensor) -> Tensor:
    """x scale + y, rounded once."""
    inner = torch.promote_types(x.dtype, torch.float32)
    return (x.to(inner) * scale_D.to(inner) + y).to(torch.promote_types(x.dtype, y.dtype))


def residual_backward(d: Tensor, x: Tensor, scale_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the scale, in fp32 (fp64); that of y is d."""
    inner = torch.promote_types(x.dtype, torch.float32)
    d = d.to(inner)
    return d * scale_D.to(inner), (d * x.to(inner)).flatten(0, -2).sum(0)
