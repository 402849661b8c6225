"""Rotary positions in plain torch: the oracle, and what runs where the kernel cannot."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(K: int, theta: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K/2,): the angle of a step of one position for each pair of a head of width K."""
    return 1.0 / theta ** (torch.arange(0, K, 2, device=device, dtype=dtype) / K)


def rotate(x_BHTK: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Llama; angles in fp32, each rounded as in transformers: far out,
    another rounding of the frequencies is another angle."""
    inner = torch.float64 if x_BHTK.dtype == torch.float64 else torch.float32
    angle = positions_T.to(inner)[:, None] * frequencies(x_BHTK.shape[-1], theta, x_BHTK.device, inner)
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BHTK.to(inner).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BHTK.dtype)


def rotary(q_BHTK: Tensor, k_BGTK: Tensor, positions_T: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `kernels.rotary.rotary`."""
    return rotate(q_BHTK, positions_T, theta), rotate(k_BGTK, positions_T, theta)
