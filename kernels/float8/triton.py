"""Triton kernels that quantise, and their launches; imported when one is first wanted. Two a matrix: the largest magnitude, in parts that are
looked through in a fixed order; and the cast, of which every program looks through the parts and writes its tile both ways round.

The cast knows numbers of 32 bits only: it rounds to 8 bits by arithmetic of whole numbers and puts four of a row, or of a column, into one word.
Kernels that converted by the GPU's instruction and wrote single bytes or pairs of them both ways round wrote wrong ones on an H200 (Triton 3.6).

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
DIGITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


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
def _eighths(x, scale, MOST: tl.constexpr, DIGITS: tl.constexpr):
    """The 8 bits of x scale, cut off at MOST and rounded to the nearest number of DIGITS binary digits after the first (ties to even), as int32."""
    LOST: tl.constexpr = 23 - DIGITS  # digits of fp32 that are rounded away
    BIAS: tl.constexpr = (1 << (6 - DIGITS)) - 1  # of the exponent
    LOWEST: tl.constexpr = 2.0 ** (1 - BIAS)  # below it numbers lie equally far apart
    SHIFT: tl.constexpr = LOWEST * 2.0**LOST  # a number from which on fp32's numbers lie as far apart
    y = tl.minimum(tl.maximum(x * scale, -MOST), MOST)
    a = tl.abs(y)
    bits = a.to(tl.int32, bitcast=True)
    large = ((bits + ((bits >> LOST) & 1) + ((1 << (LOST - 1)) - 1)) >> LOST) - ((127 - BIAS) << DIGITS)
    small = (a + SHIFT).to(tl.int32, bitcast=True) & 0xFF  # SHIFT is a power of two
    sign = (y.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(tl.abs(x) < float("inf"), tl.where(a < LOWEST, small, large) | sign, 0x7F)


@triton.jit
def float8_cast(
    X,
    ROWS,
    COLUMNS,
    LARGEST,
    STEP,
    R4,
    C4,
    stride,
    rows_stride,
    columns_stride,
    parts,
    MOST: tl.constexpr,
    DIGITS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """X has 4 R4 rows of 4 C4; ROWS, COLUMNS: words of four 8-bit numbers, in rows of so many words."""
    part = tl.arange(0, PARTS)
    largest = tl.max(tl.load(LARGEST + part, mask=part < parts, other=0.0), 0)
    step = tl.math.div_rn(tl.maximum(largest, LEAST), MOST)
    scale = tl.math.div_rn(1.0, step)
    FOURTH: tl.constexpr = TILE // 4
    r4, c4 = tl.program_id(0) * FOURTH + tl.arange(0, FOURTH), tl.program_id(1) * FOURTH + tl.arange(0, FOURTH)
    c = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside, words = (r4 < R4)[:, None] & (c < 4 * C4)[None, :], (r4 < R4)[:, None] & (c4 < C4)[None, :]
    row = 4 * r4.to(tl.int64)[:, None]
    column0 = tl.zeros((FOURTH, FOURTH), dtype=tl.int32)
    column1, column2, column3 = column0, column0, column0
    for i in tl.static_range(4):  # every fourth row
        x = tl.load(X + (row + i) * stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
        q = _eighths(x, scale, MOST, DIGITS)
        even, odd = tl.split(tl.reshape(q, (FOURTH, FOURTH, 2, 2)))
        q0, q2 = tl.split(even)
        q1, q3 = tl.split(odd)
        tl.store(ROWS + (row + i) * rows_stride + c4[None, :], q0 | (q1 << 8) | (q2 << 16) | (q3 << 24), mask=words)
        column0, column1, column2, column3 = (
            column0 | (q0 << 8 * i),
            column1 | (q1 << 8 * i),
            column2 | (q2 << 8 * i),
            column3 | (q3 << 8 * i),
        )
    at = COLUMNS + 4 * c4.to(tl.int64)[:, None] * columns_stride + r4[None, :]
    turned = tl.trans(words)
    tl.store(at, tl.trans(column0), mask=turned)
    tl.store(at + columns_stride, tl.trans(column1), mask=turned)
    tl.store(at + 2 * columns_stride, tl.trans(column2), mask=turned)
    tl.store(at + 3 * columns_stride, tl.trans(column3), mask=turned)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(STEP, step)


def words_of(matrix):
    """An 8-bit matrix as one of words of 32 bits."""
    return matrix.view(torch.uint8).view(torch.int32)


def quantise(pieces, out, beside):
    """Writes over `out`, whose sizes are multiples of 4; pieces whose own sizes are not are put together first."""
    if any(size % 4 for x in pieces for size in x.shape):
        pieces = [torch.cat([x.float() for x in pieces], 1 if beside else 0)]
    pieces = [p if p.stride(1) == 1 else p.contiguous() for p in pieces]
    small = pieces[0].device.type == "cpu"  # the interpreter
    parts, block, tile = (2, 64, 16) if small else (PARTS, BLOCK, TILE)
    largest = torch.empty(len(pieces) * parts, dtype=torch.float32, device=pieces[0].device)
    for n, x in enumerate(pieces):
        R, C = x.shape
        float8_largest[(parts,)](
            x, largest[n * parts :], R, C, x.stride(0), triton.cdiv(R * C, block), DENSE=x.is_contiguous(), BLOCK=block, num_warps=WARPS
        )
    rows, columns, at, dtype = words_of(out.rows), words_of(out.columns), 0, out.rows.dtype
    for x in pieces:
        R, C = x.shape
        to_rows, to_columns = (rows[:, at // 4 :], columns[at:]) if beside else (rows[at:], columns[:, at // 4 :])
        float8_cast[(triton.cdiv(R, tile), triton.cdiv(C, tile))](
            x, to_rows, to_columns, largest, out.step, R // 4, C // 4, x.stride(0), rows.stride(0), columns.stride(0), len(largest),
            MOST=torch.finfo(dtype).max, DIGITS=DIGITS[dtype], PARTS=triton.next_power_of_2(len(largest)), TILE=tile, num_warps=WARPS,
        )  # fmt: skip
        at += C if beside else R
