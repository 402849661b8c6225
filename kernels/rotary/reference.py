"""Rotary positions in plain torch: the oracle, and what runs where the kernel cannot."""

from __future__ import annotations

import torch
from torch import Tensor


def frequencies(K: int, theta: float, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(K/2,): the angle of a step of one position for each pair of a head of width K."""
    return 1.0 / theta ** (torch.arange(0, K, 2, device=device, dtype=dtype) / K)


def rotate(x_BHTK: Tensor, positions_T: Tensor, theta: float, frequencies_J: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Llama; angles in fp32, each rounded as in transformers: far out,
    another rounding of the frequencies is another angle. Positions and frequencies may be of rows, (B, 1, T) and (B, 1, T, J)."""
    inner = torch.float64 if x_BHTK.dtype == torch.float64 else torch.float32
    turns = frequencies(x_BHTK.shape[-1], theta, x_BHTK.device, inner) if frequencies_J is None else frequencies_J.to(inner)
    angle = positions_T.to(inner)[..., None] * turns
    cos, sin = angle.cos() * scale, angle.sin() * scale
    J = turns.shape[-1]
    x = x_BHTK.to(inner)
    a, b = x[..., :J], x[..., J : 2 * J]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * J :]], -1).to(x_BHTK.dtype)


def rotary(
    q_BHTK: Tensor, k_BGTK: Tensor, positions_T: Tensor, theta: float, frequencies_J: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of `kernels.rotary.rotary`."""
    return rotate(q_BHTK, positions_T, theta, frequencies_J, scale), rotate(k_BGTK, positions_T, theta, frequencies_J, scale)
