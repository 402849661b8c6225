"""Triton kernels of Mamba-2's scan (arXiv 2405.21060, section 6), forward and backward; `launch.py` runs them.

Time is cut into chunks of Q steps. `prepare` sums the logarithms of the decays within each chunk, `walk` carries the state from chunk to chunk
(and, mirrored, the gradient of the state), keeping what enters every chunk; `outputs`, and the backward pass's kernels of gradients.py and small.py, then
take all chunks at once, each program some heads of a group one after the other, so that B and C are read, and their product formed, once for all of
them. `carry` does what `walk` and `outputs` do where heads and states are narrow and there are heads enough for all of a GPU.

Of step t in a chunk: total_t = sum_{s<=t} dt_s A over the steps of its own document, always used as exp of a difference that is zero or below.
document_t counts the starts up to t in the chunk; nothing passes between steps of unequal counts. Steps past the end have dt = 0: they decay
nothing and add nothing. Where totals are large and their differences small, fp32 totals are not enough: FINE adds LOW, what rounding took from them.

What must not pass is selected out, not multiplied by zero, as what is not finite stays in its document. Matrix products cannot select: where
documents meet in a chunk and a result is not finite, `walk` and `outputs` say so in LOST, and `recover` takes that head's steps one by one.

Legend: b batch row, c chunk, h head, g group, i row of a chunk (its output), j row of a chunk (its input), Q, P, N as in reference.py.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def _within_documents(before, started_before, after, started_after):
    """Joins two runs of steps: the sum since the last start in them, and whether there is one."""
    return tl.where(started_after != 0, after, before + after), started_before | started_after


@triton.jit
def _all_finite(x):
    return tl.min(tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1), 0) != 0


@triton.jit
def prepare(
    DT, A, STARTS, STEP, TOTAL, LOW, DOCUMENT, T, H, chunks, dt_b, dt_t, dt_h, starts_b, starts_t,
    HAS_STARTS: tl.constexpr, FINE: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dt, totals (B, H, chunks Q) and documents (B, chunks Q), time last, so that what follows reads neighbours."""
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    q, h = tl.arange(0, Q), tl.program_id(1) * BH + tl.arange(0, BH)
    t = b * 0 + c * Q + q
    dt = tl.load(DT + b * dt_b + t[:, None] * dt_t + h[None, :] * dt_h, (t < T)[:, None] & (h < H)[None, :], other=0.0).to(tl.float32)
    a = tl.load(A + h, h < H, other=0.0)
    place = (b * H + h)[None, :] * (chunks * Q) + t[:, None]
    tl.store(STEP + place, dt, (h < H)[None, :])
    if HAS_STARTS:
        new = tl.load(STARTS + b * starts_b + t * starts_t, t < T, other=0).to(tl.int32)
        start = tl.broadcast_to(new[:, None], (Q, BH))
    if FINE:
        decay = dt.to(tl.float64) * a.to(tl.float64)[None, :]
        if HAS_STARTS:
            total, _ = tl.associative_scan((decay, start), 0, _within_documents)
        else:
            total = tl.cumsum(decay, 0)
        high = total.to(tl.float32)
        tl.store(TOTAL + place, high, (h < H)[None, :])
        tl.store(LOW + place, (total - high.to(tl.float64)).to(tl.float32), (h < H)[None, :])
    else:
        decay = dt * a[None, :]
        if HAS_STARTS:
            total, _ = tl.associative_scan((decay, start), 0, _within_documents)
        else:
            total = tl.cumsum(decay, 0)
        tl.store(TOTAL + place, total, (h < H)[None, :])
    if HAS_STARTS:
        if tl.program_id(1) == 0:
            tl.store(DOCUMENT + b * (chunks * Q) + t, tl.cumsum(new, 0))


@triton.jit
def walk(
    X, K, STEP, TOTAL, LOW, DOCUMENT, FIRST, STATES, LAST, ENTERING, PASSED, LOST, T, H, R, chunks, P, N, x_b, x_t, x_h, k_b, k_t, k_g,
    HAS_FIRST: tl.constexpr, HAS_STARTS: tl.constexpr, FINE: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The state entering every chunk (B, chunks, H, P, N), and after the last one; X is x and K is B.
    REVERSE: the gradient of the state leaving every chunk, and of h0; X is dy and K is C. Also the products of that gradient with what the
    chunk leaves of the state ENTERING it, summed over this tile's columns. A program owns a tile of one head's state."""
    tiles_n = tl.cdiv(N, BN)
    tiles = tiles_n * tl.cdiv(P, BP)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    q, p, n = tl.arange(0, Q), tile // tiles_n * BP + tl.arange(0, BP), tile % tiles_n * BN + tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    place = p[:, None] * N + n[None, :]
    state = tl.zeros((BP, BN), tl.float32)
    if HAS_FIRST:
        state = tl.load(FIRST + (b * H + h) * P * N + place, inside, other=0.0)
    for k in range(0, chunks):
        c = b * 0 + (chunks - 1 - k if REVERSE else k)
        t = c * Q + q
        x = tl.load(X + (b * x_b + c * Q * x_t + h * x_h) + q[None, :] * x_t + p[:, None], (p < P)[:, None] & (t < T)[None, :], other=0.0)
        key = tl.load(
            K + (b * k_b + c * Q * k_t + h // R * k_g) + q[:, None] * k_t + n[None, :], (t < T)[:, None] & (n < N)[None, :], other=0.0
        )
        row = (b * H + h) * (chunks * Q) + c * Q
        total, end = tl.load(TOTAL + row + q), tl.load(TOTAL + row + Q - 1)
        if REVERSE:
            weight = tl.exp(total)
        else:
            gap = end - total
            if FINE:
                gap += tl.load(LOW + row + Q - 1) - tl.load(LOW + row + q)
            weight = tl.exp(gap) * tl.load(STEP + row + q)
        through = tl.exp(end)
        if HAS_STARTS:
            document = tl.load(DOCUMENT + b * (chunks * Q) + c * Q + q)
            last = tl.load(DOCUMENT + b * (chunks * Q) + c * Q + Q - 1)
            mine = document == (0 if REVERSE else last)
        entry = (b * chunks + c) * H + h
        tl.store(STATES + entry * P * N + place, state.to(STATES.dtype.element_ty), inside)
        if REVERSE:
            entering = tl.load(ENTERING + entry * P * N + place, inside, other=0.0).to(tl.float32)
            passed = tl.sum(entering * state, 1) * through
            if HAS_STARTS:
                passed = tl.where(last == 0, passed, 0.0)
            tl.store(PASSED + (entry * tiles_n + tile % tiles_n) * P + p, passed, p < P)
        weighted, kept = x.to(tl.float32) * weight[None, :], state * through
        if HAS_STARTS:
            weighted, kept = tl.where(mine[None, :], weighted, 0.0), tl.where(last == 0, kept, 0.0)
        state = tl.dot(weighted.to(DOT), key.to(DOT), acc=kept, input_precision=PRECISION)
        if HAS_STARTS and not REVERSE:
            if last > 0:
                if not _all_finite(state):
                    tl.store(LOST + b * H + h, 1)
    tl.store(LAST + (b * H + h) * P * N + place, state, inside)


@triton.jit
def outputs(
    X, BM, CM, D, STEP, TOTAL, LOW, DOCUMENT, STATES, Y, LOST, T, H, R, blocks, chunks, P, N, x_b, x_t, x_h, b_b, b_t, b_g, c_b, c_t, c_g,
    HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y_i = sum_{j<=i} (C_i . B_j) exp(total_i - total_j) dt_j x_j + exp(total_i) C_i h + D x_i, up to HEADS heads of a group."""
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    first = b * 0 + c * Q
    t = first + q
    rows_n, rows_p, inside = (t < T)[:, None] & (n < N)[None, :], (t < T)[:, None] & (p < P)[None, :], (p < P)[None, :] & (n < N)[:, None]
    query = tl.load(CM + (b * c_b + first * c_t + g * c_g) + q[:, None] * c_t + n[None, :], rows_n, other=0.0).to(DOT)
    key = tl.load(BM + (b * b_b + first * b_t + g * b_g) + q[:, None] * b_t + n[None, :], rows_n, other=0.0).to(DOT)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    allowed = q[:, None] >= q[None, :]
    if HAS_STARTS:
        document = tl.load(DOCUMENT + b * (chunks * Q) + t)
        last = tl.load(DOCUMENT + b * (chunks * Q) + first + Q - 1)
        allowed = allowed & (document[:, None] == document[None, :])
    for k in tl.range(0, tl.minimum(HEADS, R - block * HEADS), num_stages=STAGES):
        h = g * R + block * HEADS + k
        row = (b * H + h) * (chunks * Q) + first
        x = tl.load(X + (b * x_b + first * x_t + h * x_h) + q[:, None] * x_t + p[None, :], rows_p, other=0.0)
        state = tl.load(STATES + ((b * chunks + c) * H + h) * P * N + p[None, :] * N + n[:, None], inside, other=0.0)
        total, step = tl.load(TOTAL + row + q), tl.load(STEP + row + q)
        gap = total[:, None] - total[None, :]
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[:, None] - low[None, :]
        weight = (scores * tl.exp(tl.where(allowed, gap, float("-inf"))) * step[None, :]).to(DOT)
        left = tl.exp(total)
        if HAS_STARTS:
            left = tl.where(document == 0, left, 0.0)
        y = tl.dot(query, state.to(DOT), input_precision=PRECISION) * left[:, None]
        y = tl.dot(weight, x.to(DOT), acc=y, input_precision=PRECISION)
        if HAS_SKIP:
            y += x.to(tl.float32) * tl.load(D + h)
        if HAS_STARTS:
            if last > 0:
                if not _all_finite(y):
                    tl.store(LOST + b * H + h, 1)
        tl.store(Y + ((b * T + first) * H + h) * P + q[:, None] * (H * P) + p[None, :], y.to(Y.dtype.element_ty), rows_p)


@triton.jit
def carry(
    X, BM, CM, D, STEP, TOTAL, LOW, DOCUMENT, FIRST, STATES, LAST, Y, LOST, T, H, R, chunks, x_b, x_h, b_b, b_g, c_b, c_g,
    P: tl.constexpr, N: tl.constexpr, x_t: tl.constexpr, b_t: tl.constexpr, c_t: tl.constexpr,
    KEEP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`walk` and `outputs` in one, for narrow heads and states: a program carries one head's state through all chunks, and no state is written but the
    last, or where KEEP, for the backward pass, also those entering a chunk. C B^T is formed for each head anew, which takes less time than the states'
    way through memory."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    place = (b * H + h) * P * N + p[:, None] * N + n[None, :]
    state = tl.zeros((BP, BN), tl.float32)
    if HAS_FIRST:
        state = tl.load(FIRST + place, inside, other=0.0)
    skip = tl.load(D + h) if HAS_SKIP else 0.0
    for c in tl.range(0, chunks, num_stages=STAGES):
        first = b * 0 + c * Q
        t, row = first + q, (b * H + h) * (chunks * Q) + first
        rows_n, rows_p = (t < T)[:, None] & (n < N)[None, :], (t < T)[:, None] & (p < P)[None, :]
        x = tl.load(X + (b * x_b + first * x_t + h * x_h) + q[:, None] * x_t + p[None, :], rows_p, other=0.0).to(DOT)
        key = tl.load(BM + (b * b_b + first * b_t + h // R * b_g) + q[:, None] * b_t + n[None, :], rows_n, other=0.0).to(DOT)
        query = tl.load(CM + (b * c_b + first * c_t + h // R * c_g) + q[:, None] * c_t + n[None, :], rows_n, other=0.0).to(DOT)
        total, step, end = tl.load(TOTAL + row + q), tl.load(STEP + row + q), tl.load(TOTAL + row + Q - 1)
        gap, to_end, allowed = total[:, None] - total[None, :], end - total, q[:, None] >= q[None, :]
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[:, None] - low[None, :]
            to_end += tl.load(LOW + row + Q - 1) - low
        left, right, kept = tl.exp(total), tl.exp(to_end) * step, state * tl.exp(end)
        if HAS_STARTS:
            document = tl.load(DOCUMENT + b * (chunks * Q) + t)
            last = tl.load(DOCUMENT + b * (chunks * Q) + first + Q - 1)
            allowed = allowed & (document[:, None] == document[None, :])
            left, kept = tl.where(document == 0, left, 0.0), tl.where(last == 0, kept, 0.0)
        if KEEP:
            entering = ((b * chunks + c) * H + h) * P * N + p[:, None] * N + n[None, :]
            tl.store(STATES + entering, state.to(STATES.dtype.element_ty), inside)
        weight = tl.dot(query, tl.trans(key), input_precision=PRECISION) * tl.exp(tl.where(allowed, gap, float("-inf"))) * step[None, :]
        y = tl.dot(query, tl.trans(state).to(DOT), input_precision=PRECISION) * left[:, None]
        y = tl.dot(weight.to(DOT), x, acc=y, input_precision=PRECISION)
        if HAS_SKIP:
            y += x.to(tl.float32) * skip
        tl.store(Y + ((b * T + first) * H + h) * P + q[:, None] * (H * P) + p[None, :], y.to(Y.dtype.element_ty), rows_p)
        added = key.to(tl.float32) * right[:, None]
        if HAS_STARTS:
            added = tl.where((document == last)[:, None], added, 0.0)
        state = tl.dot(tl.trans(x), added.to(DOT), acc=kept, input_precision=PRECISION)
        if HAS_STARTS:
            if last > 0:
                if not (_all_finite(state) and _all_finite(y)):
                    tl.store(LOST + b * H + h, 1)
    tl.store(LAST + place, state, inside)


@triton.jit
def recover(
    X, DT, A, BM, CM, D, STARTS, FIRST, Y, LAST, LOST, T, H, R, P, N, x_b, x_t, x_h, dt_b, dt_t, dt_h, b_b, b_t, b_g, c_b, c_t, c_g,
    starts_b, starts_t, HAS_SKIP: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The definition, step by step, of the heads marked LOST; the others' programs end at once."""
    tiles = tl.cdiv(P, BP)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    if tl.load(LOST + b * H + h) != 0:
        p, n = tile * BP + tl.arange(0, BP), tl.arange(0, BN)
        place, inside = (b * H + h) * P * N + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :]
        state = tl.load(FIRST + place, inside, other=0.0)
        a = tl.load(A + h)
        skip = tl.load(D + h) if HAS_SKIP else 0.0
        for step in range(0, T):
            t = b * 0 + step
            x = tl.load(X + b * x_b + t * x_t + h * x_h + p, p < P, other=0.0).to(tl.float32)
            key = tl.load(BM + b * b_b + t * b_t + h // R * b_g + n, n < N, other=0.0).to(tl.float32)
            query = tl.load(CM + b * c_b + t * c_t + h // R * c_g + n, n < N, other=0.0).to(tl.float32)
            dt = tl.load(DT + b * dt_b + t * dt_t + h * dt_h).to(tl.float32)
            kept = state * tl.exp(dt * a)
            kept = tl.where(tl.load(STARTS + b * starts_b + t * starts_t) != 0, 0.0, kept)
            state = kept + (dt * x)[:, None] * key[None, :]
            y = tl.sum(state * query[None, :], 1) + skip * x
            tl.store(Y + ((b * T + t) * H + h) * P + p, y.to(Y.dtype.element_ty), p < P)
        tl.store(LAST + place, state, inside)
