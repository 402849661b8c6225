"""One token of M2RNN between its projections, in one kernel: convolution, gate, the state's product with the head's weight, tanh, output and skip.

A program owns one head's state, which it reads and writes once, BK rows at a time. The convolution of queries and keys, which a group's heads share, is made again by
each of them, from the cache.

Legend: b row of the batch, h head of values, g head of queries and keys, k row and v column of a head's state, C channels of the convolution, W its
width.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.m2rnn.triton import exact_tanh
from kernels.parts import convolved, softplus


@triton.jit
def step(
    ROWS, PAST, CONV, DT_BIAS, A_LOG, WEIGHT, SKIP, STATE, STARTS, O, NEXT, AFTER, H, K, V, G, C, row_stride,
    HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """ROWS (B, C + H) hold q, k, v and the gate; PAST and NEXT are (B, W-1, C), STATE and AFTER (B, H, K, V) and may be the same."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    v = tl.arange(0, BV)
    in_v = v < V
    weight = tl.load(WEIGHT + h.to(tl.int64) * V * V + v[:, None] * V + v[None, :], mask=in_v[:, None] & in_v[None, :], other=0.0).to(
        tl.float32
    )
    row = ROWS + b * row_stride
    past, following = PAST + b * (W - 1) * C, NEXT + b * (W - 1) * C
    start = tl.load(STARTS + b) != 0 if HAS_STARTS else False
    step_size = softplus(tl.load(row + C + h).to(tl.float32) + tl.load(DT_BIAS + h).to(tl.float32))
    g = -tl.exp(tl.load(A_LOG + h).to(tl.float32)) * step_size
    keep = tl.exp(g)
    # 1 - exp(g), by its series where rounding would take the digits of a small g
    write = tl.where(g > -0.1, -g * (1.0 + g / 2 * (1.0 + g / 3 * (1.0 + g / 4 * (1.0 + g / 5)))), 1.0 - keep)
    heads = H // G
    once = tl.where(h % heads == 0, C, 0)  # one of a group's programs moves the inputs of queries and keys on
    y = convolved(row, past, following, CONV, CONV, 2 * G * K + h * V + v, in_v, C, start, C, W, HAS_STARTS, False)
    o = tl.load(SKIP + h * V + v, mask=in_v, other=0.0).to(tl.float32) * y
    for first in range(0, K, BK):
        k = first + tl.arange(0, BK)
        in_k, shared = k < K, h // heads * K + k
        inside, place = in_k[:, None] & in_v[None, :], (b * H + h) * K * V + k[:, None] * V + v[None, :]
        state = tl.load(STATE + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_STARTS:
            state = tl.where(start, 0.0, state)
        q = convolved(row, past, following, CONV, CONV, shared, in_k, once, start, C, W, HAS_STARTS, False)
        x = convolved(row, past, following, CONV, CONV, G * K + shared, in_k, once, start, C, W, HAS_STARTS, False)
        content = exact_tanh(tl.dot(state, weight, x[:, None] * y[None, :], input_precision=PRECISION))
        state = keep * state + write * content
        tl.store(AFTER + place, state, mask=inside)
        o += tl.sum(q[:, None] * state, 0)
    tl.store(O + (b * H + h) * V + v, o.to(O.dtype.element_ty), mask=in_v)
