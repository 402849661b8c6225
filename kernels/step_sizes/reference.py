"""Step sizes in plain torch: the oracle, and what runs where the kernels cannot.

Legend: B batch, T time, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def step_sizes(dt_BTH: Tensor, bias_H: Tensor, low: float, high: float) -> Tensor:
    """softplus(dt + bias) between the limits, in fp32 (fp64)."""
    inner = torch.promote_types(dt_BTH.dtype, torch.float32)
    return F.softplus(dt_BTH.to(inner) + bias_H.to(inner)).clamp(low, high)


def step_sizes_backward(d_BTH: Tensor, dt_BTH: Tensor, bias_H: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Gradients of dt and bias; nothing passes where a limit holds."""
    inner = torch.promote_types(dt_BTH.dtype, torch.float32)
    x = dt_BTH.to(inner) + bias_H.to(inner)
    size = F.softplus(x)
    d = torch.where((size < low) | (size > high), 0.0, d_BTH.to(inner) * torch.sigmoid(x))
    return d.to(dt_BTH.dtype), d.flatten(0, -2).sum(0).to(bias_H.dtype)
