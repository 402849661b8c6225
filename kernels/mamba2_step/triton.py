"""One token of Mamba-2 between its two projections, in one kernel: convolution, step size, recurrence and skip.

A program owns some rows of one head's state, which it reads and writes once: with many rows of the batch that is what takes the time. The
convolution of B and C, which a group's heads share, is made again by each of them, from the cache.

Legend: b row of the batch, h head, g group, p row and n column of a head's state, C channels of the convolution, W its width.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.parts import clamped, convolved, softplus


@triton.jit
def step(
    ROWS, PAST, CONV, CONV_BIAS, DT_BIAS, A_LOG, SKIP, STATE, STARTS, Y, NEXT, AFTER, H, P, N, groups, C, row_stride, low, high,
    HAS_STARTS: tl.constexpr, W: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """ROWS (B, I + C + H) hold the gate, x B C and dt; PAST and NEXT are (B, W-1, C), STATE and AFTER (B, H, P, N) and may be the same."""
    tiles = tl.cdiv(P, BP)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    p, n = tile * BP + tl.arange(0, BP), tl.arange(0, BN)
    in_p, in_n = p < P, n < N
    both = in_p[:, None] & in_n[None, :]
    place = ((b * H + h) * P + p)[:, None] * N + n[None, :]
    state = tl.load(STATE + place, mask=both, other=0.0)
    row = ROWS + b * row_stride + H * P
    past, following = PAST + b * (W - 1) * C, NEXT + b * (W - 1) * C
    start = tl.load(STARTS + b) != 0 if HAS_STARTS else False
    dt = softplus(tl.load(row + C + h).to(tl.float32) + tl.load(DT_BIAS + h).to(tl.float32))
    dt = clamped(dt, low, high)
    kept = state * tl.exp(-dt * tl.exp(tl.load(A_LOG + h).to(tl.float32)))
    if HAS_STARTS:
        kept = tl.where(start, 0.0, kept)
    heads = H // groups
    shared = H * P + h // heads * N + n
    once = tl.where((h % heads == 0) & (tile == 0), C, 0)  # one of a group's programs moves the inputs of B and C on
    x = convolved(row, past, following, CONV, CONV_BIAS, h * P + p, in_p, C, start, C, W, HAS_STARTS, True)
    into = convolved(row, past, following, CONV, CONV_BIAS, shared, in_n, once, start, C, W, HAS_STARTS, True)
    out = convolved(row, past, following, CONV, CONV_BIAS, shared + groups * N, in_n, once, start, C, W, HAS_STARTS, True)
    state = kept + (dt * x)[:, None] * into[None, :]
    tl.store(AFTER + place, state, mask=both)
    y = tl.sum(state * out[None, :], 1) + tl.load(SKIP + h).to(tl.float32) * x
    tl.store(Y + (b * H + h) * P + p, y.to(Y.dtype.element_ty), mask=in_p)
