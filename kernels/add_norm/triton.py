"""Triton kernels of residual addition and norm, and their launches; imported when one is first wanted.

A program holds whole rows in registers: one read of every input, one write of every output. Gradients of scale and weight are one partial sum
a program, added in a fixed order. Backward, rows are on their way while those before them are computed, and where two gradients are written four
programs a multiprocessor of an H200 are enough: 0.141 ms for 0.174 of 32,768 rows of 1,024 (docs/results/step.md).

Legend: N rows, D width.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.gated_norm.launch import PER_WARP, PER_WARP_BACK, tile
from kernels.parts import RUNS, runs, summed

RUNS_OF_TWO = 528  # at most, where two gradients are written


@triton.jit
def forward(X, Y, SCALE, WEIGHT, STREAM, NORM, N, D, EPS, SCALED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    row, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, BD)[None, :]
    inside = (row < N)[:, None] & (c < D)
    i = row.to(tl.int64)[:, None] * D + c
    r = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        r *= tl.load(SCALE + c, mask=c < D, other=0.0).to(tl.float32)
    r += tl.load(Y + i, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(WEIGHT + c, mask=c < D, other=0.0).to(tl.float32)
    stored = r.to(STREAM.dtype.element_ty)
    tl.store(STREAM + i, stored, mask=inside)
    r = stored.to(tl.float32)  # the norm is of what the stream holds, as if it were read from there
    n = r * tl.rsqrt(tl.sum(r * r, 1) / D + EPS)[:, None] * w
    tl.store(NORM + i, n.to(NORM.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    DR, DN, STREAM, X, SCALE, WEIGHT, DX, DY, D_SCALE, D_WEIGHT, N, D, ROWS, EPS,
    SCALED: tl.constexpr, COPY: tl.constexpr, HAS_DR: tl.constexpr, STAGES: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BD)[None, :]
    w = tl.load(WEIGHT + c, mask=c < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BR, BD), tl.float32)
    d_scale = tl.zeros((BR, BD), tl.float32)
    if SCALED:
        s = tl.load(SCALE + c, mask=c < D, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, N)
    for start in tl.range(first, last, BR, num_stages=STAGES):
        row = start + tl.arange(0, BR)
        inside = (row < last)[:, None] & (c < D)
        i = row.to(tl.int64)[:, None] * D + c
        r = tl.load(STREAM + i, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(DN + i, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(DR + i, mask=inside, other=0.0).to(tl.float32) if HAS_DR else 0.0
        scale = tl.rsqrt(tl.sum(r * r, 1) / D + EPS)[:, None]
        n = r * scale
        d_weight += dn * n
        dn *= w
        d += scale * (dn - n * (tl.sum(dn * n, 1)[:, None] / D))
        if SCALED:
            d_scale += d * tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
            tl.store(DX + i, (d * s).to(DX.dtype.element_ty), mask=inside)
        else:
            tl.store(DX + i, d.to(DX.dtype.element_ty), mask=inside)
        if COPY:
            tl.store(DY + i, d.to(DY.dtype.element_ty), mask=inside)
    part = tl.program_id(0).to(tl.int64) * D + c
    tl.store(D_WEIGHT + part, tl.sum(d_weight, 0)[None, :], mask=c < D)
    if SCALED:
        tl.store(D_SCALE + part, tl.sum(d_scale, 0)[None, :], mask=c < D)


def stages(columns):
    """Rows of so many columns in flight: shared memory holds all but one of them."""
    return 3 if columns <= 1024 else 2 if columns <= 2048 else 1


def add_norm(x, y, scale, weight, eps, dtype):
    """(r, norm), contiguous."""
    x, y, D = x.contiguous(), y.contiguous(), x.shape[-1]
    N = x.numel() // D
    BR, BD, warps = tile(D, x.device, PER_WARP)
    r = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype), device=x.device)
    norm = torch.empty(x.shape, dtype=dtype, device=x.device)
    given = x if scale is None else scale.contiguous()
    forward[(triton.cdiv(N, BR),)](
        x, y, given, weight.contiguous(), r, norm, N, D, eps, SCALED=scale is not None, BR=BR, BD=BD, num_warps=warps
    )
    return r, norm


def add_norm_backward(d_r, d_n, r, x, scale, weight, eps, dtypes):
    """Gradients of x and y in `dtypes` (one tensor where they are the same), of scale (None without one) and weight. d_r: None where nobody reads r."""
    has_d_r, d_n, D = d_r is not None, d_n.contiguous(), r.shape[-1]
    d_r = d_r.contiguous() if has_d_r else r
    N = r.numel() // D
    BR, BD, warps = tile(D, r.device, PER_WARP_BACK)
    copied = scale is not None or dtypes[0] != dtypes[1]
    each, programs = runs(N, BR, RUNS_OF_TWO if copied else RUNS)
    dx = torch.empty(r.shape, dtype=dtypes[0], device=r.device)
    dy = torch.empty(r.shape, dtype=dtypes[1], device=r.device) if copied else dx
    partial = torch.empty(2 if scale is not None else 1, programs, D, dtype=torch.float32, device=r.device)
    given = (r, r) if scale is None else (x.contiguous(), scale.contiguous())
    backward[(programs,)](
        d_r, d_n, r, *given, weight.contiguous(), dx, dy, partial[-1], partial[0], N, D, each, eps,
        SCALED=scale is not None, COPY=copied, HAS_DR=has_d_r, STAGES=stages(BD), BR=BR, BD=BD, num_warps=warps,
    )  # fmt: skip
    d_scale = summed(partial[1]).to(scale.dtype) if scale is not None else None
    return dx, dy, d_scale, summed(partial[0]).to(weight.dtype)
