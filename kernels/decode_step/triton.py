"""The kernels of a fused decoding step. A program owns one row of the batch and a few outputs, and asks for its weights before anything else:
with one token a step, the time is that of reading the weights, and of starting kernels.

Legend: B rows, N outputs, K inputs, H heads, P head width, M state width, W convolution width.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from kernels.parts import clamped, silu, softplus


@triton.jit
def project(
    X, GATE, NORM, WEIGHT, WEIGHT2, OUT, KEEP, PAST, CONV, CONV_BIAS, N, K, sx, sg, so, conv_first, conv_last, silu_first, silu_last, eps,
    GATED: tl.constexpr, NORMED: tl.constexpr, PAIR: tl.constexpr, ADD: tl.constexpr, KEPT: tl.constexpr, W: tl.constexpr, PDL: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """OUT (B, N) = epilogue(WEIGHT (N, K) @ prologue(X)).

    Prologue: X * GATE where GATED = 1 (before the norm) or 2 (after it), RMSNorm with weights NORM. Epilogue: PAIR: silu(y) * (WEIGHT2 @ ..);
    W: outputs conv_first to conv_last go through a causal convolution of width W and silu, its past inputs PAST (B, W-1, C) moved on; outputs
    silu_first to silu_last go through silu; ADD: OUT * KEEP (if KEPT) is added.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    here = n < N
    k = tl.arange(0, BK)
    rows = n.to(tl.int64)[:, None] * K + k[None, :]
    sums = tl.zeros((BN, BK), tl.float32)
    sums2 = tl.zeros((BN, BK), tl.float32)
    squares = tl.zeros((BK,), tl.float32)
    weight = tl.load(WEIGHT + rows, mask=here[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for first in range(0, K, BK):
        inside = first + k < K
        both = here[:, None] & inside[None, :]
        if first > 0:
            weight = tl.load(WEIGHT + rows + first, mask=both, other=0.0)
        if PAIR:
            weight2 = tl.load(WEIGHT2 + rows + first, mask=both, other=0.0)
        x = tl.load(X + b * sx + first + k, mask=inside, other=0.0).to(tl.float32)
        if GATED == 1:
            x *= tl.load(GATE + b * sg + first + k, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x *= tl.load(NORM + first + k, mask=inside, other=0.0).to(tl.float32)
        if GATED == 2:
            x *= tl.load(GATE + b * sg + first + k, mask=inside, other=0.0).to(tl.float32)
        sums += weight.to(tl.float32) * x[None, :]
        if PAIR:
            sums2 += weight2.to(tl.float32) * x[None, :]
    y = tl.sum(sums, 1)
    scale = 1.0
    if NORMED:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y *= scale
    if PAIR:
        y = silu(y) * (tl.sum(sums2, 1) * scale)
    if W > 0:
        C = conv_last - conv_first
        c = n - conv_first
        inside = here & (c >= 0) & (c < C)
        mixed = tl.load(CONV_BIAS + c, mask=inside, other=0.0).to(tl.float32)
        mixed += y * tl.load(CONV + c * W + W - 1, mask=inside, other=0.0).to(tl.float32)
        past = PAST + b * (W - 1) * C + c
        for w in tl.static_range(W - 1):
            before = tl.load(past + w * C, mask=inside, other=0.0).to(tl.float32)
            mixed += before * tl.load(CONV + c * W + w, mask=inside, other=0.0).to(tl.float32)
        for w in tl.static_range(W - 2):
            tl.debug_barrier()  # several threads hold the same channel: none may read what another has moved on
            before = tl.load(past + (w + 1) * C, mask=inside, other=0.0)
            tl.debug_barrier()
            tl.store(past + w * C, before, mask=inside)
        tl.debug_barrier()
        tl.store(past + (W - 2) * C, y.to(PAST.dtype.element_ty), mask=inside)
        y = tl.where(inside, silu(mixed), y)
    y = tl.where((n >= silu_first) & (n < silu_last), silu(y), y)
    place = OUT + b * so + n
    if ADD:
        kept = tl.load(place, mask=here, other=0.0).to(tl.float32)
        if KEPT:
            kept *= tl.load(KEEP + n, mask=here, other=0.0).to(tl.float32)
        y += kept
    tl.store(place, y.to(OUT.dtype.element_ty), mask=here)


@triton.jit
def ssm(
    X, B_, C_, DT, DT_BIAS, A_LOG, SKIP, STATE, Y, H, P, M, groups, sp, sy, low, high, PDL: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """One step of Mamba-2's recurrence: STATE (B, H, P, M) moved on in place, Y (B, H P) = STATE C + SKIP X. X, B_, C_ and DT are parts of
    rows sp apart."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, m = tl.program_id(2) * BP + tl.arange(0, BP), tl.arange(0, BM)
    in_p, in_m = p < P, m < M
    both = in_p[:, None] & in_m[None, :]
    place = STATE + ((b * H + h) * P + p)[:, None] * M + m[None, :]
    state = tl.load(place, mask=both, other=0.0)
    A = -tl.exp(tl.load(A_LOG + h))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dt = clamped(softplus(tl.load(DT + b * sp + h) + tl.load(DT_BIAS + h)), low, high)
    g = h // (H // groups)
    x = tl.load(X + b * sp + h * P + p, mask=in_p, other=0.0)
    into = tl.load(B_ + b * sp + g * M + m, mask=in_m, other=0.0)
    out = tl.load(C_ + b * sp + g * M + m, mask=in_m, other=0.0)
    state = tl.exp(dt * A) * state + (dt * x)[:, None] * into[None, :]
    tl.store(place, state, mask=both)
    y = tl.sum(state * out[None, :], 1) + tl.load(SKIP + h) * x
    tl.store(Y + b * sy + h * P + p, y, mask=in_p)
