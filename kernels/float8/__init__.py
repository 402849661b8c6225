"""quantised: tensors as one matrix of 8-bit floats under one scale (tensorwise, dynamic), and the same matrix transposed.

The largest magnitude becomes the dtype's largest number. Products of fp8 on an H100 want both operands with the summed dimension innermost, so
each matrix is wanted both ways.

Legend: M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import no_triton, planned
from kernels.float8 import reference

__all__ = ["E4M3", "E5M2", "Quantised", "product", "quantised"]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2  # more digits, for inputs and weights; more range, for gradients


class Quantised(NamedTuple):
    """rows (M, N) and columns (N, M), both contiguous; times step (fp32, of no dimension) they are what was given."""

    rows: Tensor
    columns: Tensor
    step: Tensor

    @classmethod
    def empty(cls, M: int, N: int, dtype: torch.dtype, device: torch.device) -> Quantised:
        step = torch.empty((), dtype=torch.float32, device=device)
        return cls(torch.empty(M, N, dtype=dtype, device=device), torch.empty(N, M, dtype=dtype, device=device), step)


def quantised(pieces: Sequence[Tensor], dtype: torch.dtype, beside: bool = False, out: Quantised | None = None) -> Quantised:
    """Matrices below each other, or beside each other, under one scale. What is not finite becomes NaN and does not count for the scale.
    out: what to write over."""
    M = pieces[0].shape[0] if beside else sum(p.shape[0] for p in pieces)
    N = sum(p.shape[1] for p in pieces) if beside else pieces[0].shape[1]
    out = Quantised.empty(M, N, dtype, pieces[0].device) if out is None else out
    if planned() or not out.rows.numel():
        return out
    if no_triton(out.rows.device) or M % 4 or N % 4:
        for own, made in zip(out, reference.quantised(pieces, dtype, beside)):
            own.copy_(made)
        return out
    from kernels.float8 import triton

    with torch.cuda.device_of(out.rows):
        triton.quantise(pieces, out, beside)
    return out


def product(
    a_MK: Tensor, b_NK: Tensor, step_a: Tensor, step_b: Tensor, dtype: torch.dtype, fast: bool, bias_N: Tensor | None = None
) -> Tensor:
    """a b^T (M, N) in `dtype`, times both steps; sizes are multiples of 16. fast: the tensor cores add up with fewer digits."""
    if planned():
        return a_MK.new_empty(a_MK.shape[0], b_NK.shape[0], dtype=dtype)
    return torch._scaled_mm(a_MK, b_NK.T, scale_a=step_a, scale_b=step_b, bias=bias_N, out_dtype=dtype, use_fast_accum=fast)
