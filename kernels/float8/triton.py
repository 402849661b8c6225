"""Triton kernels that quantise, and their launches; imported when one is first wanted. Two a matrix: the largest magnitude, in parts that are
looked through in a fixed order; and the cast, of which every program looks through the parts. torch transposes: kernels that wrote the transposed
matrix as well, as single bytes or two bytes at a time, wrote wrong ones on an H200 (Triton 3.6), the second also among the rows.

Legend: R rows, C columns of a matrix that is given.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.float8.reference import SMALLEST

PARTS, BLOCK, TILE = 256, 8192, 128  # programs that look for the largest, elements they take at once; rows and columns of a cast's tile
WARPS = 8
LEAST = tl.constexpr(SMALLEST)


@triton.jit
def float8_largest(X, LARGEST, R, C, stride, blocks, DENSE: tl.constexpr, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), dtype=tl.float32)
    for n in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i = tl.full((), n, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        j = i if DENSE else i // C * stride + i % C
        size = tl.abs(tl.load(X + j, mask=i < R.to(tl.int64) * C, other=0.0).to(tl.float32))
        found = tl.maximum(found, tl.where(size < float("inf"), size, 0.0))
    tl.store(LARGEST + tl.program_id(0), tl.max(found, 0))


@triton.jit
def float8_cast(
    X,
    ROWS,
    LARGEST,
    STEP,
    R,
    C,
    stride,
    rows_stride,
    parts,
    MOST: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(LARGEST + part, mask=part < parts, other=0.0), 0)
    step = tl.maximum(largest, LEAST) / MOST
    r, c = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (r < R)[:, None] & (c < C)[None, :]
    x = tl.load(X + r.to(tl.int64)[:, None] * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.minimum(tl.maximum(x * (1.0 / step), -MOST), MOST)
    q = tl.where(tl.abs(x) < float("inf"), y, float("nan")).to(ROWS.dtype.element_ty)
    tl.store(ROWS + r.to(tl.int64)[:, None] * rows_stride + c[None, :], q, mask=inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(STEP, step)


def quantise(pieces, out, beside):
    """Writes over `out`."""
    pieces = [p if p.stride(1) == 1 else p.contiguous() for p in pieces]
    small = pieces[0].device.type == "cpu"  # the interpreter
    parts, block, tile = (2, 64, 16) if small else (PARTS, BLOCK, TILE)
    largest = torch.empty(len(pieces) * parts, dtype=torch.float32, device=pieces[0].device)
    for n, x in enumerate(pieces):
        R, C = x.shape
        float8_largest[(parts,)](
            x, largest[n * parts :], R, C, x.stride(0), triton.cdiv(R * C, block), DENSE=x.is_contiguous(), BLOCK=block, num_warps=WARPS
        )
    at, most = 0, torch.finfo(out.rows.dtype).max
    for x in pieces:
        R, C = x.shape
        rows = out.rows[:, at : at + C] if beside else out.rows[at : at + R]
        float8_cast[(triton.cdiv(R, tile), triton.cdiv(C, tile))](
            x, rows, largest, out.step, R, C, x.stride(0), rows.stride(0), len(largest),
            MOST=most, PARTS=triton.next_power_of_2(len(largest)), TILE=tile, num_warps=WARPS,
        )  # fmt: skip
        at += C if beside else R
    out.columns.view(torch.uint8).copy_(out.rows.view(torch.uint8).T)
