"""What several Triton kernels are made of; imports Triton. The short convolution writes its SiLU out: a call there costs it 39 registers."""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import triton
import triton.language as tl

RUNS = 1024  # most runs of rows of a backward pass


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def softplus(x):
    """max(x, 0) + log(1 + e), e = exp(-|x|), the logarithm as 2 artanh(e / (2 + e)): small e keep all their digits. NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def clamped(x, low, high):
    """x between low and high, NaN where x is."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)


def runs(N: int, tile: int) -> tuple[int, int]:
    """(rows of a run, runs) of N >= 1 rows taken `tile` at a time: the gradient of a weight is one partial sum a run, so there are not too many."""
    each = triton.cdiv(triton.cdiv(N, RUNS), tile) * tile
    return each, triton.cdiv(N, each)
