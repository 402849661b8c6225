"""The norm of gradients of which every rank has a part."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.tensor_lists import total_norm, use_triton


def squares(parts: list[Tensor], device: torch.device) -> Tensor:
    """The sum of all squares, fp64, on `device`: in one launch where the kernel takes the parts, by torch's lists elsewhere."""
    if use_triton(parts):
        return total_norm(parts).double().square()
    total = torch.zeros((), dtype=torch.float64, device=device)
    return total + torch.stack(torch._foreach_norm(parts)).double().square().sum() if parts else total


def root(total: Tensor) -> Tensor:
    """Norms of sums of squares, fp32; -1 where one is not finite, which is DeepSpeed's word for it."""
    return torch.where(total.isfinite(), total.sqrt(), -1.0).float()
