"""Functions that several Triton kernels call; imports Triton. The short convolution writes its SiLU out: calling `silu` there costs it 39 registers."""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

RUNS = 1024  # into so many runs at most a backward pass cuts its rows


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), as max(x, 0) + log(1 + e) with e = exp(-|x|). The logarithm is summed as the series of 2 artanh(e / (2 + e)): in 1 + e the
    digits of a small e would be rounded away. NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def clamped(x, low, high):
    """x between low and high, NaN where x is."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def convolved(
    ROW, PAST, NEXT, CONV, CONV_BIAS, c, inside, written, start, C, W: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """One token's convolution and silu of the channels c, fp32; their inputs are moved on from PAST to NEXT, both (W-1, C), of channels below
    `written`. W = 0: the row holds the results."""
    x = tl.load(ROW + c, mask=inside, other=0.0)
    if W == 0:
        return x.to(tl.float32)
    mixed = tl.load(CONV_BIAS + c, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    mixed += x.to(tl.float32) * tl.load(CONV + c * W + W - 1, mask=inside, other=0.0).to(tl.float32)
    for w in tl.static_range(W - 1):
        before = tl.load(PAST + w * C + c, mask=inside, other=0.0)
        if HAS_STARTS:
            before = tl.where(start, 0.0, before)
        mixed += before.to(tl.float32) * tl.load(CONV + c * W + w, mask=inside, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(NEXT + (w - 1) * C + c, before.to(NEXT.dtype.element_ty), mask=inside & (c < written))
    tl.store(NEXT + (W - 2) * C + c, x.to(NEXT.dtype.element_ty), mask=inside & (c < written))
    return silu(mixed)


def runs(N: int, tile: int, at_most: int = RUNS) -> tuple[int, int]:
    """(rows of a run, number of runs) for N >= 1 rows that programs take `tile` at a time. Each run leaves one partial sum of a weight's gradient in
    memory, so their number has a limit."""
    each = triton.cdiv(triton.cdiv(N, at_most), tile) * tile
    return each, triton.cdiv(N, each)


@triton.jit
def sum_of_runs(PARTIAL, OUT, R, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS columns of a (R, D) matrix summed over its rows, always in one order."""
    d, r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, R, ROWS):
        inside = (first + r < R)[:, None] & (d < D)[None, :]
        total += tl.load(PARTIAL + (first + r).to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(OUT + d, tl.sum(total, 0), mask=d < D)


def summed(partial: torch.Tensor) -> torch.Tensor:
    """The sum of partial sums (R, ...), fp32 and contiguous, over R. torch's own takes three times as long for a thousand rows, and clears memory before."""
    R, shape = partial.shape[0], partial.shape[1:]
    out = torch.empty(shape, dtype=torch.float32, device=partial.device)
    D, columns = out.numel(), 16
    if D:
        sum_of_runs[(triton.cdiv(D, columns),)](
            partial, out, R, D, ROWS=min(256, triton.next_power_of_2(max(R, 1))), COLUMNS=columns, num_warps=8
        )
    return out
