"""silu(gate) up in plain torch: the oracle, and what runs where the kernels cannot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu_backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    s = torch.sigmoid(gate)
    return d * up * s * (1 + gate * (1 - s)), d * gate * s
