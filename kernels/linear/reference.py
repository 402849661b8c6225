"""The products in plain torch, each by itself: the oracle, and what runs where `kernels.linear.joins` says no."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products take x: autocast's for fp32, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if x.dtype == torch.float32 and torch.is_autocast_enabled(kind) else x.dtype


def linears(x: Tensor, *layers: nn.Linear, apart: int = 0) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., D). apart: of those at the end, which lie apart from the others; here all do."""
    return tuple(F.linear(x, layer.weight, layer.bias) for layer in layers)


def of_heads(x_MEK: Tensor, weight_EKO: Tensor) -> Tensor:
    """(E, M, O): what each head's matrix makes of its channels."""
    return torch.bmm(x_MEK.transpose(0, 1), weight_EKO.to(x_MEK.dtype))


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """What `layer` makes of x (..., D)."""
    return F.linear(x, layer.weight, layer.bias)
