"""The products in plain torch, each by itself: the oracle, and what runs where `kernels.linear.joins` says no."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products take x: autocast's for fp32, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype == torch.float32 and torch.is_autocast_enabled(kind) else x.dtype


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., D)."""
    return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """What `layer` makes of x (..., D)."""
    return F.linear(x, layer.weight, layer.bias)
