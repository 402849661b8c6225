"""Triton kernels of the short convolution; `launch.py` runs them.

A program owns BD neighbouring channels of one slice of time and walks it, the last inputs in registers, so that every input is read once
(and W-1 more at a slice's border). UNROLL rows are loaded before the arithmetic of the first. A document start empties those registers.
The backward pass computes the convolution again for the derivative of SiLU and carries the gradients of the W-1 inputs that later outputs
still add to; the sums for weight and bias are one partial a program, added in a fixed order.

Legend: B batch, T time, D channels, W width, H = W-1 inputs of history.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds, and variables change type with the constants)
import triton
import triton.language as tl


@triton.jit
def _row(P, HISTORY, t, d, D, sxt, sht, H: tl.constexpr, HAS_HISTORY: tl.constexpr):
    """Input t >= -H of one sequence: those before 0 are the history, or zero."""
    x = tl.load(P + t.to(tl.int64) * sxt + d, mask=d < tl.where(t >= 0, D, 0), other=0.0).to(tl.float32)
    if HAS_HISTORY:
        x += tl.load(HISTORY + (t + H) * sht + d, mask=d < tl.where(t < 0, D, 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def _window(P, HISTORY, Q, first, d, D, sxt, sht, W: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_STARTS: tl.constexpr):
    """The W-1 inputs before `first`, newest first, empty where a document starts after them."""
    past = ()
    for k in tl.static_range(1, W):
        past = past + (_row(P, HISTORY, first - k, d, D, sxt, sht, W - 1, HAS_HISTORY),)
    if HAS_STARTS:
        kept = (past[0],)
        closed = tl.load(Q + first - 1, mask=first >= 1, other=0)
        for k in tl.static_range(1, W - 1):
            kept = kept + (tl.where(closed != 0, 0.0, past[k]),)
            closed = closed | tl.load(Q + first - 1 - k, mask=first >= 1 + k, other=0)
        past = kept
    return past


@triton.jit
def _emptied(past, start, W: tl.constexpr):
    kept = ()
    for k in tl.static_range(W - 1):
        kept = kept + (tl.where(start != 0, 0.0, past[k]),)
    return kept


@triton.jit
def forward(
    X, HISTORY, WEIGHT, BIAS, STARTS, Y, T, D, SLICE, slices, sxb, sxt, shb, sht,
    W: tl.constexpr, SILU: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_STARTS: tl.constexpr, U: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BD)
    program = tl.program_id(0)
    d = (program % blocks) * BD + tl.arange(0, BD)
    first = ((program // blocks) % slices) * SLICE
    b = (program // (blocks * slices)).to(tl.int64)
    last = tl.minimum(first + SLICE, T)
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(WEIGHT + d * W + k, mask=d < D, other=0.0).to(tl.float32),)
    bias = tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    past = _window(X + b * sxb, HISTORY + b * shb, STARTS + b * T, first, d, D, sxt, sht, W, HAS_HISTORY, HAS_STARTS)
    p = X + b * sxb + first.to(tl.int64) * sxt + d
    q = STARTS + b * T + first
    out = Y + (b * T + first) * D + d
    for t in range(first, last, U):
        rows = ()
        starts = ()
        for u in tl.static_range(U):
            rows = rows + (tl.load(p + u * sxt, mask=d < tl.where(t + u < last, D, 0), other=0.0),)
            if HAS_STARTS:
                starts = starts + (tl.load(q + u, mask=t + u < last, other=0),)
        for u in tl.static_range(U):
            x = rows[u].to(tl.float32)
            if HAS_STARTS:
                past = _emptied(past, starts[u], W)
            y = bias + taps[W - 1] * x
            for k in tl.static_range(1, W):
                y += taps[W - 1 - k] * past[k - 1]
            if SILU:
                y = y / (1.0 + tl.exp2(-1.4426950408889634 * y))
            tl.store(out + u * D, y.to(Y.dtype.element_ty), mask=d < tl.where(t + u < last, D, 0))
            past = (x,) + past[: W - 2]
        p += U * sxt
        q += U
        out += U * D


@triton.jit
def backward(
    X, HISTORY, WEIGHT, BIAS, STARTS, DY, DX, D_HISTORY, PARTIAL, T, D, SLICE, slices, sxb, sxt, shb, sht, syb, syt, sdb, sdt,
    W: tl.constexpr, SILU: tl.constexpr, HAS_HISTORY: tl.constexpr, HAS_STARTS: tl.constexpr, U: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(D, BD)
    program = tl.program_id(0)
    d = (program % blocks) * BD + tl.arange(0, BD)
    s = (program // blocks) % slices
    b = (program // (blocks * slices)).to(tl.int64)
    first = s * SLICE
    last = tl.minimum(first + SLICE, T)
    taps = ()
    sums = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(WEIGHT + d * W + k, mask=d < D, other=0.0).to(tl.float32),)
        sums = sums + (tl.zeros((BD,), tl.float32),)
    bias = tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)
    d_bias = tl.zeros((BD,), tl.float32)
    past = _window(X + b * sxb, HISTORY + b * shb, STARTS + b * T, first, d, D, sxt, sht, W, HAS_HISTORY, HAS_STARTS)
    pending = ()  # gradients so far of the W-1 inputs before this one, newest first
    reached = ()  # whether this document holds them
    for _ in tl.static_range(1, W):
        pending = pending + (tl.zeros((BD,), tl.float32),)
        reached = reached + (first >= 0,)
    p = X + b * sxb + first.to(tl.int64) * sxt + d
    g = DY + b * syb + first.to(tl.int64) * syt + d
    q = STARTS + b * T + first
    out = DX + b * sdb + (first - W + 1).to(tl.int64) * sdt + d
    end = tl.minimum(last + W - 1, T)
    for t in range(first, last + W - 1, U):
        rows = ()
        grads = ()
        starts = ()
        for u in tl.static_range(U):
            rows = rows + (tl.load(p + u * sxt, mask=d < tl.where(t + u < end, D, 0), other=0.0),)
            grads = grads + (tl.load(g + u * syt, mask=d < tl.where(t + u < end, D, 0), other=0.0),)
            if HAS_STARTS:
                starts = starts + (tl.load(q + u, mask=t + u < end, other=0),)
        for u in tl.static_range(U):
            x = rows[u].to(tl.float32)
            dz = grads[u].to(tl.float32)
            if HAS_STARTS:
                past = _emptied(past, starts[u], W)
            if SILU:
                z = bias + taps[W - 1] * x
                for k in tl.static_range(1, W):
                    z += taps[W - 1 - k] * past[k - 1]
                gate = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))
                dz *= gate * (1.0 + z * (1.0 - gate))
            own = tl.where(t + u < last, dz, 0.0)  # the next slice sums its own outputs
            d_bias += own
            new_sums = ()
            for k in tl.static_range(W - 1):
                new_sums = new_sums + (sums[k] + own * past[W - 2 - k],)
            sums = new_sums + (sums[W - 1] + own * x,)
            added = (taps[W - 1] * dz,)
            kept = ()
            for k in tl.static_range(1, W):
                if HAS_STARTS:
                    inside = reached[k - 1] & (starts[u] == 0)
                    added = added + (pending[k - 1] + taps[W - 1 - k] * tl.where(inside, dz, 0.0),)
                    kept = kept + (inside,)
                else:
                    added = added + (pending[k - 1] + taps[W - 1 - k] * dz,)
            row = t + u - (W - 1)
            done = added[W - 1]
            tl.store(out + u * sdt, done.to(DX.dtype.element_ty), mask=d < tl.where((row >= first) & (row < last), D, 0))
            if HAS_HISTORY:  # the first slice waits for all outputs that the history adds to, however many slices they lie in
                before = D_HISTORY + (b * (W - 1) + t + u) * D + d
                tl.store(before, done.to(D_HISTORY.dtype.element_ty), mask=d < tl.where((row < 0) & (s == 0), D, 0))
            past = (x,) + past[: W - 2]
            pending = added[: W - 1]
            if HAS_STARTS:
                reached = (first >= 0,) + kept[: W - 2]
        p += U * sxt
        g += U * syt
        q += U
        out += U * sdt
    o = PARTIAL + (b * slices + s) * (W + 1) * D + d
    for k in tl.static_range(W):
        tl.store(o + k * D, sums[k], mask=d < D)
    tl.store(o + W * D, d_bias, mask=d < D)
