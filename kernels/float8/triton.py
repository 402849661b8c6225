"""Triton kernels that quantise, and their launches; imported when one is first wanted. Two a matrix: the largest magnitude, in parts that are
looked through in a fixed order; and the cast, of which every program looks through the parts.

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
def _eighth(x, step, MOST: tl.constexpr, KIND: tl.constexpr):
    """The 8 bits of x / step."""
    x = x.to(tl.float32)
    y = tl.minimum(tl.maximum(x * (1.0 / step), -MOST), MOST)
    return tl.where(tl.abs(x) < float("inf"), y, float("nan")).to(KIND)


@triton.jit
def float8_cast(
    X,
    ROWS,
    PAIRS,
    LARGEST,
    STEP,
    R,
    C,
    stride,
    rows_stride,
    pairs_stride,
    parts,
    MOST: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PAIRED: tl.constexpr,
):
    """PAIRS: the transposed matrix, two rows as one number of 16 bits: tiles of single bytes were transposed wrongly on a GPU."""
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(LARGEST + part, mask=part < parts, other=0.0), 0)
    step = tl.maximum(largest, LEAST) / MOST
    pair, c = tl.program_id(0) * (TILE // 2) + tl.arange(0, TILE // 2), tl.program_id(1) * TILE + tl.arange(0, TILE)
    r = 2 * pair.to(tl.int64)[:, None]
    first, second = (r < R) & (c < C)[None, :], (r + 1 < R) & (c < C)[None, :]
    x, y = X + r * stride + c[None, :], ROWS + r * rows_stride + c[None, :]
    a = _eighth(tl.load(x, mask=first, other=0.0), step, MOST, ROWS.dtype.element_ty)
    b = _eighth(tl.load(x + stride, mask=second, other=0.0), step, MOST, ROWS.dtype.element_ty)
    tl.store(y, a, mask=first)
    tl.store(y + rows_stride, b, mask=second)
    if PAIRED:
        both = a.to(tl.uint8, bitcast=True).to(tl.uint16) | (b.to(tl.uint8, bitcast=True).to(tl.uint16) << 8)
        at = PAIRS + c.to(tl.int64)[:, None] * pairs_stride + pair[None, :]
        tl.store(at, tl.trans(both.to(tl.int16, bitcast=True)), mask=tl.trans(second))
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
        columns = out.columns[at : at + C] if beside else out.columns[:, at : at + R]
        paired = R % 2 == out.columns.shape[1] % 2 == columns.storage_offset() % 2 == 0
        pairs = columns.view(torch.int16) if paired else rows
        float8_cast[(triton.cdiv(R, tile), triton.cdiv(C, tile))](
            x, rows, pairs, largest, out.step, R, C, x.stride(0), rows.stride(0), pairs.stride(0), len(largest),
            MOST=most, PARTS=triton.next_power_of_2(len(largest)), TILE=tile, PAIRED=paired, num_warps=WARPS,
        )  # fmt: skip
        if not paired:
            columns.view(torch.uint8).copy_(rows.view(torch.uint8).T)
        at += C if beside else R
