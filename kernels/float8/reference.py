"""Quantising in plain torch: the oracle, and what runs where Triton cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-30  # of a tensor's largest magnitude, so that the scale is finite


def quantised(pieces: Sequence[Tensor], dtype: torch.dtype, beside: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, step), see `kernels.float8.Quantised`."""
    x, most = torch.cat([p.float() for p in pieces], 1 if beside else 0), torch.finfo(dtype).max
    fine = torch.isfinite(x)
    largest = torch.where(fine, x.abs(), 0.0).amax().clamp(min=SMALLEST)
    step = largest / torch.full_like(largest, most)  # by a number, torch on a GPU multiplies by its reciprocal
    rows = torch.where(fine, (x * (1 / step)).clamp(-most, most), torch.nan).to(dtype)
    return rows, rows.T.contiguous(), step
