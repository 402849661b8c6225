"""Triton kernels of the scaled residual, and their launches; imported when one is first wanted.

The gradient of the scale is one partial sum a program, added in a fixed order.

Legend: N rows, D width.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.parts import runs, summed

COLUMNS, ELEMENTS, WARPS = 512, 2048, 4


@triton.jit
def forward(X, Y, SCALE, OUT, N, D, BR: tl.constexpr, BD: tl.constexpr):
    row, c = tl.program_id(0) * BR + tl.arange(0, BR), tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    inside = (row < N)[:, None] & (c < D)
    i = row.to(tl.int64)[:, None] * D + c
    x = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(Y + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(SCALE + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(OUT + i, (x * s + y).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def backward(DOUT, X, SCALE, DX, DY, PARTIAL, N, D, ROWS, COPY: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    c = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    s = tl.load(SCALE + c, mask=c < D, other=0.0).to(tl.float32)
    total = tl.zeros((BR, BD), tl.float32)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, N)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        inside = (row < last)[:, None] & (c < D)
        i = row.to(tl.int64)[:, None] * D + c
        d = tl.load(DOUT + i, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + i, (d * s).to(DX.dtype.element_ty), mask=inside)
        if COPY:
            tl.store(DY + i, d.to(DY.dtype.element_ty), mask=inside)
        total += d * x
    tl.store(PARTIAL + tl.program_id(0).to(tl.int64) * D + c, tl.sum(total, 0)[None, :], mask=c < D)


def tile(N, D, device):
    """(rows, columns) of a program."""
    columns = min(COLUMNS, triton.next_power_of_2(D))
    return (2 if device.type == "cpu" else ELEMENTS // columns), columns


def add(x, y, scale):
    """x scale + y, contiguous."""
    x, y, D = x.contiguous(), y.contiguous(), x.shape[-1]
    N = x.numel() // D
    BR, BD = tile(N, D, x.device)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype), device=x.device)
    forward[(triton.cdiv(N, BR), triton.cdiv(D, BD))](x, y, scale.contiguous(), out, N, D, BR=BR, BD=BD, num_warps=WARPS)
    return out


def add_backward(d, x, scale, dtype):
    """Gradients of x, of y in `dtype` (d itself if it is of it) and of the scale."""
    d, x, D = d.contiguous(), x.contiguous(), x.shape[-1]
    N = x.numel() // D
    BR, BD = tile(N, D, x.device)
    each, programs = runs(N, BR)
    dx, copied = torch.empty_like(x), d.dtype != dtype
    dy = torch.empty(d.shape, dtype=dtype, device=d.device) if copied else d
    partial = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    backward[(programs, triton.cdiv(D, BD))](
        d, x, scale.contiguous(), dx, dy, partial, N, D, each, COPY=copied, BR=BR, BD=BD, num_warps=WARPS
    )
    return dx, dy, summed(partial).to(scale.dtype)
