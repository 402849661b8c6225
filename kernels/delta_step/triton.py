"""One token of the delta rule between its projections, in one kernel: convolution, gates, norms of query and keys, updates, output.

A program owns some rows of one head's state, which it reads and writes once: with many rows of the batch that is what takes the time. The
convolution of queries and keys, which a group's heads share, is made again by each of them, from the cache.

Legend: b row of the batch, h head of values, g head of queries and keys, p row and c column of a head's state, u update of the token,
C channels of the convolution, W its width (0: its outputs are given).
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.parts import convolved, sigmoid, softplus


@triton.jit
def step(
    ROWS, PAST, CONV, DT_BIAS, A_LOG, STATE, STARTS, O, NEXT, AFTER, H, V, K, G, n, C, row_stride, eps, strength, scale,
    HAS_STARTS: tl.constexpr, GATED: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ROWS (B, C + n H (+ H)) hold q, the keys and the values of all updates, b and, if GATED, the gate; PAST and NEXT are (B, W-1, C), STATE and
    AFTER (B, H, V, K) and may be the same."""
    tiles = tl.cdiv(V, BV)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    p, c = tile * BV + tl.arange(0, BV), tl.arange(0, BK)
    in_p, in_c = p < V, c < K
    both = in_p[:, None] & in_c[None, :]
    place = ((b * H + h) * V + p)[:, None] * K + c[None, :]
    state = tl.load(STATE + place, mask=both, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = ROWS + b * row_stride
    past, following = PAST + b * (W - 1) * C, NEXT + b * (W - 1) * C
    start = tl.load(STARTS + b) != 0 if HAS_STARTS else False
    if GATED:
        step_size = softplus(tl.load(row + C + n * H + h).to(tl.float32) + tl.load(DT_BIAS + h).to(tl.float32))
        log_gate = -tl.exp(tl.load(A_LOG + h).to(tl.float32)) * step_size
        state = tl.where(log_gate == float("-inf"), 0.0, state * tl.exp(log_gate))
    if HAS_STARTS:
        state = tl.where(start, 0.0, state)
    heads = H // G
    g = h // heads
    once = tl.where((h % heads == 0) & (tile == 0), C, 0)  # one of a group's programs moves the inputs of queries and keys on
    q = convolved(row, past, following, CONV, CONV, g * K + c, in_c, once, start, C, W, HAS_STARTS, False)
    q *= tl.rsqrt(tl.sum(q * q, 0) + eps) * scale
    for u in range(n):
        k = convolved(row, past, following, CONV, CONV, ((u + 1) * G + g) * K + c, in_c, once, start, C, W, HAS_STARTS, False)
        k *= tl.rsqrt(tl.sum(k * k, 0) + eps)
        v = convolved(row, past, following, CONV, CONV, (n + 1) * G * K + (u * H + h) * V + p, in_p, C, start, C, W, HAS_STARTS, False)
        beta = strength * sigmoid(tl.load(row + C + u * H + h).to(tl.float32))
        state += (beta * (v - tl.sum(state * k[None, :], 1)))[:, None] * k[None, :]
    tl.store(AFTER + place, state, mask=both)
    o = tl.sum(state * q[None, :], 1)
    tl.store(O + (b * H + h) * V + p, o.to(O.dtype.element_ty), mask=in_p)
