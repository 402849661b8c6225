"""Triton kernels of the delta rule (arXiv 2406.06484, 2412.06464), forward; `gradients.py` has the backward pass's, `launch.py` runs them.

Time is cut into chunks of Q = 64 sub-steps. With d_i the decay from the chunk's start to i, D_ij that from j to i, and S the state entering the
chunk, the corrected values u_i = b_i (v_i - a_i S_{i-1} k_i) of a chunk solve (I + L) u = b (v - d S k), L_ij = b_i D_ij k_i . k_j below the
diagonal. `project` makes (I + L)^-1, blocks of 16 by forward substitution (powers of L, as in a doubling, would lose all digits where keys repeat and
b is 2) and from them the others by products, and with it W = (I + L)^-1 b d k and U = (I + L)^-1 b v; `walk` carries the state
from chunk to chunk, with u = U - W S; `outputs` takes all chunks at once.

Of sub-step i: TOTAL the sum of the logarithms of the gates from the chunk's start, in fp64, as differences are taken of it; DOCUMENT how often until
then the state was left behind, at a document's start or by a gate of zero: between unequal counts nothing passes. RK and RQ are one over the norms of
keys and queries: rows are scaled after the products. Sub-steps past the end have b = 0 and zeros for keys: they change nothing.

What must not pass is selected out, not multiplied by zero. Matrix products cannot select: where documents meet in a chunk and a result is not
finite, `walk` and `outputs` say so in LOST, and `recover` takes that head's steps one by one.

Legend: b batch row, h head, c chunk, i row of a chunk (what reads), j row of a chunk (what was written), K, V, S, T as in reference.py, N updates a
token, R heads that share a key. TWO: keys are wider than a tile (BK columns): tiles called `other` hold the columns from BK on.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def all_finite(x):
    return tl.min(tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1), 0) != 0


@triton.jit
def where_is(chunks, H):
    """(row of the chunk's first sub-step in buffers (B, H, chunks Q), batch row, head, chunk, its first sub-step) of this program."""
    bh = (tl.program_id(0) // chunks).to(tl.int64)
    c = bh * 0 + tl.program_id(0) % chunks
    return (bh * chunks + c) * 64, bh // H, bh % H, c, c * 64


@triton.jit
def rows_of(first, S, N: tl.constexpr):
    """Of a chunk from sub-step `first` on: (its first token, the token of each row after that one, which of the token's updates it is, whether there
    is such a sub-step). 64 bits for the chunk, 32 for what lies in it, which costs a third of the instructions."""
    q = tl.arange(0, 64)
    since = (first % N).to(tl.int32) + q
    return first // N, since // N, since % N, q < tl.minimum(S - first, 64).to(tl.int32)


@triton.jit
def inverse_norms(x, NORM: tl.constexpr):
    """One over the norm of each row, or ones."""
    out = tl.full((64,), 1.0, tl.float32)
    if NORM:
        wide = x.to(tl.float32)
        out = tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)
    return out


@triton.jit
def inverse_norms_of_both(x, y, NORM: tl.constexpr):
    """One over the norm of each row, of which x and y hold the first and the other columns, or ones."""
    out = tl.full((64,), 1.0, tl.float32)
    if NORM:
        first, other = x.to(tl.float32), y.to(tl.float32)
        out = tl.rsqrt(tl.sum(first * first, 1) + tl.sum(other * other, 1) + 1e-6)
    return out


@triton.jit
def columns_of(X, rows, there, k, K):
    """The columns k (below K) of rows that begin so far behind X, zeros where there is no such row."""
    return tl.load(X + rows[:, None] + k[None, :], there[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def sums_of(TOTAL, DOCUMENT, row):
    """(TOTAL, DOCUMENT) of a chunk's sub-steps, and both of the last. Loads keep their order: those that nothing has to wait for stand first."""
    q = tl.arange(0, 64)
    return tl.load(TOTAL + row + q), tl.load(DOCUMENT + row + q), tl.load(TOTAL + row + 63), tl.load(DOCUMENT + row + 63)


@triton.jit
def decays(sums):
    """(D (Q, Q), d, decays to the chunk's end, the whole chunk's) of `sums_of` a chunk, nothing between documents."""
    q = tl.arange(0, 64)
    total, document, end, last = sums
    between = (total[:, None] - total[None, :]).to(tl.float32)
    allowed = (q[:, None] >= q[None, :]) & (document[:, None] == document[None, :])
    pairs = tl.exp(tl.where(allowed, between, float("-inf")))
    before = tl.exp(tl.where(document == 0, total.to(tl.float32), float("-inf")))
    after = tl.exp(tl.where(document == last, (end - total).to(tl.float32), float("-inf")))
    return pairs, before, after, tl.where(last == 0, tl.exp(end.to(tl.float32)), 0.0)


@triton.jit
def _inverse_of_unit(system):
    """(I + L)^-1 of a strictly lower triangle L (64, 64). Four squares of 16 along the diagonal at once, each in one warp, row by row; then
    pairs of them, then both pairs, by products."""
    r, d = tl.arange(0, 16), tl.arange(0, 4)
    same = (d[:, None] == d[None, :])[:, None, :, None]
    square = tl.sum(tl.where(same, tl.reshape(system, (4, 16, 4, 16)), 0.0), 2)
    mirrored = tl.permute(square, (0, 2, 1))
    x = tl.zeros((4, 16, 16), tl.float32) + tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    for i in range(1, 16):
        column = tl.sum(tl.where(r[None, None, :] == i, mirrored, 0.0), 2)
        x = tl.where(r[None, :, None] == i, x - tl.sum(column[:, :, None] * x, 1)[:, None, :], x)
    # within halves of 32: what is below the diagonal is -x1 l x0
    even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, 16, 16)), (0, 2, 3, 1)))
    p = tl.arange(0, 2)
    half = tl.sum(tl.where((p[:, None] == p[None, :])[:, None, :, None], tl.reshape(system, (2, 32, 2, 32)), 0.0), 2)
    halves = tl.reshape(half, (2, 2, 16, 2, 16))
    below = tl.sum(tl.sum(tl.where((p[:, None] > p[None, :])[None, :, None, :, None], halves, 0.0), 3), 1)
    corner = -tl.dot(odd, tl.dot(below, even, input_precision="tf32x3"), input_precision="tf32x3")
    none = tl.zeros((2, 16, 16), tl.float32)
    four = tl.join(tl.join(even, corner), tl.join(none, odd))  # (2, 16, 16, row of squares, column)
    blocks = tl.reshape(tl.permute(four, (0, 3, 1, 4, 2)), (2, 32, 32))
    first, second = tl.split(tl.permute(blocks, (1, 2, 0)))
    wide = tl.reshape(system, (2, 32, 2, 32))
    across = tl.sum(tl.sum(tl.where((p[:, None] > p[None, :])[:, None, :, None], wide, 0.0), 2), 0)
    lowest = -tl.dot(second, tl.dot(across, first, input_precision="tf32x3"), input_precision="tf32x3")
    nothing = tl.zeros((32, 32), tl.float32)
    whole = tl.join(tl.join(first, lowest), tl.join(nothing, second))
    return tl.reshape(tl.permute(whole, (2, 0, 3, 1)), (64, 64))


@triton.jit
def project(
    X, VALUES, G, BETA, STARTS, TOTAL, DOCUMENT, RK, STEP, INVERSE, W, U, S, H, R, chunks, K, V, x_b, x_t, x_g, v_b, v_t, v_h, g_b, g_t, g_h,
    b_b, b_t, b_h, s_b, s_t, HAS_G: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_VALUES: tl.constexpr, KEEP: tl.constexpr, GIVEN: tl.constexpr,
    NORM: tl.constexpr, N: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What is known of each sub-step, W (B, H, chunks Q, K) and U (B, H, chunks Q, V); KEEP: also (I + L)^-1 (B, H, chunks, Q, Q), in registers
    throughout; GIVEN: that and what is known of the sub-steps is there already. The inverse's columns are scaled, so that keys and values go into
    products as they are."""
    row, b, h, _, first = where_is(chunks, H)
    token, tokens, update, inside = rows_of(first, S, N)
    q, k = tl.arange(0, 64), tl.arange(0, BK)
    keys = tl.load(
        X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :], inside[:, None] & (k < K)[None, :], other=0.0
    )
    square = row * 64 + (q * 64)[:, None] + q[None, :]
    if GIVEN:
        total, document = tl.load(TOTAL + row + q), tl.load(DOCUMENT + row + q)
        rk, step = tl.load(RK + row + q), tl.load(STEP + row + q)
        inverse = tl.load(INVERSE + square).to(tl.float32)
    else:
        gate, new = tl.zeros((64,), tl.float32), tl.zeros((64,), tl.int32)
        lead = inside & (update == 0)
        if HAS_G:
            gate = tl.load(G + (b * g_b + token * g_t + h * g_h) + tokens * g_t, lead, other=0.0).to(tl.float32)
        if HAS_STARTS:
            new = tl.load(STARTS + (b * s_b + token * s_t) + tokens * s_t, lead, other=0).to(tl.int32)
        step = tl.load(BETA + (b * b_b + first * b_t + h * b_h) + q * b_t, inside, other=0.0).to(tl.float32)
        if TWO:
            other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K)
            rk = inverse_norms_of_both(keys, other, NORM)
        else:
            rk = inverse_norms(keys, NORM)
        gone = gate < -87.0
        new, gate = new | gone.to(tl.int32), tl.where(gone, 0.0, gate)
        total, document = tl.cumsum(gate.to(tl.float64), 0), tl.cumsum(new, 0)
        tl.store(TOTAL + row + q, total)
        tl.store(DOCUMENT + row + q, document)
        tl.store(RK + row + q, rk)
        tl.store(STEP + row + q, step)
        products = tl.dot(keys.to(DOT), tl.trans(keys.to(DOT)), input_precision=PRECISION)
        if TWO:
            products = tl.dot(other.to(DOT), tl.trans(other.to(DOT)), acc=products, input_precision=PRECISION)
        allowed = (q[:, None] > q[None, :]) & (document[:, None] == document[None, :])
        between = tl.exp(tl.where(allowed, (total[:, None] - total[None, :]).to(tl.float32), 0.0))
        inverse = _inverse_of_unit(tl.where(allowed, products * between * (step * rk)[:, None] * rk[None, :], 0.0))
        if KEEP:
            tl.store(INVERSE + square, inverse.to(INVERSE.dtype.element_ty))
    before = tl.exp(tl.where(document == 0, total.to(tl.float32), float("-inf")))
    by_keys = (inverse * (step * before * rk)[None, :]).to(DOT)
    w = tl.dot(by_keys, keys.to(DOT), input_precision=PRECISION)
    w = tl.where((document == 0)[:, None], w, 0.0)
    tl.store(W + row * K + (q * K)[:, None] + k[None, :], w.to(W.dtype.element_ty), tl.broadcast_to((k < K)[None, :], (64, BK)))
    if TWO:  # loaded again: held for so long they would spill
        other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K)
        w = tl.where((document == 0)[:, None], tl.dot(by_keys, other.to(DOT), input_precision=PRECISION), 0.0)
        tl.store(
            W + row * K + BK + (q * K)[:, None] + k[None, :], w.to(W.dtype.element_ty), tl.broadcast_to((BK + k < K)[None, :], (64, BK))
        )
    if HAS_VALUES:
        scaled = (inverse * step[None, :]).to(DOT)
        for begin in range(0, V, BV):
            v = begin + tl.arange(0, BV)
            values = tl.load(
                VALUES + (b * v_b + first * v_t + h * v_h) + (q * v_t)[:, None] + v[None, :], inside[:, None] & (v < V)[None, :], other=0.0
            )
            u = tl.dot(scaled, values.to(DOT), input_precision=PRECISION)
            tl.store(U + row * V + (q * V)[:, None] + v[None, :], u.to(U.dtype.element_ty), tl.broadcast_to((v < V)[None, :], (64, BV)))


@triton.jit
def walk(
    X, TOTAL, DOCUMENT, RK, W, U, FIRST, STATES, CORRECTED, LAST, LOST, S, H, R, chunks, K, V, x_b, x_t, x_g,
    MARK: tl.constexpr, KEEP: tl.constexpr, GIVEN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The state entering every chunk (B, H, chunks, V, K), the last one, and the corrected values (B, H, chunks Q, V) over the norms of their keys,
    so that they are rounded once where no gate comes between. A program owns some rows of one head's state. KEEP: all of it, else the last state
    only. GIVEN: the corrected values are there already; the states made of them are the same bit for bit, as what is added to a state is rounded as
    what is left of it."""
    tiles = tl.cdiv(V, BV)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v = tl.arange(0, 64), tl.arange(0, BK), tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    inside, place = (v < V)[:, None] & (k < K)[None, :], v[:, None] * K + k[None, :]
    state = tl.load(FIRST + bh * V * K + place, inside, other=0.0)
    if TWO:
        inside_other = (v < V)[:, None] & (BK + k < K)[None, :]
        state_other = tl.load(FIRST + bh * V * K + BK + place, inside_other, other=0.0)
    for chunk in range(0, chunks):
        c = bh * 0 + chunk
        row, first = (bh * chunks + c) * 64, c * 64
        inside_chunk = q < tl.minimum(S - first, 64).to(tl.int32)
        keys = tl.load(
            X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :],
            inside_chunk[:, None] & (k < K)[None, :],
            other=0.0,
        )
        mine = tl.broadcast_to((v < V)[None, :], (64, BV))
        if GIVEN:
            corrected = tl.load(CORRECTED + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0)
        else:
            w = tl.load(W + row * K + (q * K)[:, None] + k[None, :], tl.broadcast_to((k < K)[None, :], (64, BK)), other=0.0)
            u = tl.load(U + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0)
        total, document, rk = tl.load(TOTAL + row + q), tl.load(DOCUMENT + row + q), tl.load(RK + row + q)
        end, last = tl.load(TOTAL + row + 63), tl.load(DOCUMENT + row + 63)
        low = state.to(STATES.dtype.element_ty)
        if KEEP:
            tl.store(STATES + (bh * chunks + c) * V * K + place, low, inside)
            if TWO:
                tl.store(STATES + (bh * chunks + c) * V * K + BK + place, state_other.to(STATES.dtype.element_ty), inside_other)
        if not GIVEN:
            taken = tl.dot(w.to(DOT), tl.trans(low.to(DOT)), input_precision=PRECISION)
            if TWO:
                w_other = tl.load(
                    W + row * K + BK + (q * K)[:, None] + k[None, :], tl.broadcast_to((BK + k < K)[None, :], (64, BK)), other=0.0
                )
                taken = tl.dot(w_other.to(DOT), tl.trans(state_other.to(DOT)), acc=taken, input_precision=PRECISION)
            corrected = (u.to(tl.float32) - tl.where((document == 0)[:, None], taken, 0.0)) * rk[:, None]
            corrected = corrected.to(CORRECTED.dtype.element_ty)
            if KEEP:
                tl.store(CORRECTED + row * V + (q * V)[:, None] + v[None, :], corrected, mine)
        after = tl.exp(tl.where(document == last, (end - total).to(tl.float32), float("-inf")))
        added = tl.where((document == last)[:, None], corrected.to(tl.float32) * after[:, None], 0.0)
        kept = tl.where(last == 0, state * tl.exp(end.to(tl.float32)), 0.0)
        state = tl.dot(tl.trans(added.to(DOT)), keys.to(DOT), acc=kept, input_precision=PRECISION)
        if TWO:
            other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside_chunk, BK + k, K)
            kept = tl.where(last == 0, state_other * tl.exp(end.to(tl.float32)), 0.0)
            state_other = tl.dot(tl.trans(added.to(DOT)), other.to(DOT), acc=kept, input_precision=PRECISION)
        if MARK:
            if last > 0:
                if not all_finite(state):
                    tl.store(LOST + bh, 1)
                if TWO:
                    if not all_finite(state_other):
                        tl.store(LOST + bh, 1)
    tl.store(LAST + bh * V * K + place, state, inside)
    if TWO:
        tl.store(LAST + bh * V * K + BK + place, state_other, inside_other)


@triton.jit
def outputs(
    X, Y, TOTAL, DOCUMENT, CORRECTED, STATES, O, LOST, scale, S, H, R, chunks, K, V, x_b, x_t, x_g, y_b, y_t, y_g,
    MARK: tl.constexpr, NORM: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """o_i = d_i S q_i + sum_{j<=i} D_ij (q_i . k_j) u_j, at the last sub-step of every token. CORRECTED: u_j over the norm of k_j, as `walk` leaves it."""
    row, b, h, c, first = where_is(chunks, H)
    q, k = tl.arange(0, 64), tl.arange(0, BK)
    token, rows, update, inside = rows_of(first, S, N)
    read = inside & (update == N - 1)
    query = tl.load(
        Y + (b * y_b + token * y_t + h // R * y_g) + (rows * y_t)[:, None] + k[None, :], read[:, None] & (k < K)[None, :], other=0.0
    )
    keys = tl.load(
        X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :], inside[:, None] & (k < K)[None, :], other=0.0
    )
    sums = sums_of(TOTAL, DOCUMENT, row)
    if TWO:
        query_other = columns_of(Y + (b * y_b + token * y_t + h // R * y_g), rows * y_t, read, BK + k, K)
        rq = inverse_norms_of_both(query, query_other, NORM) * scale
    else:
        rq = inverse_norms(query, NORM) * scale
    query = query.to(DOT)
    keys = keys.to(DOT)
    pairs, before, _, _ = decays(sums)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if TWO:
        other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K)
        scores = tl.dot(query_other.to(DOT), tl.trans(other.to(DOT)), acc=scores, input_precision=PRECISION)
    scores = scores * pairs * rq[:, None]
    scores = tl.where(pairs != 0.0, scores, 0.0).to(DOT)
    _, document, _, last = sums
    to = ((b * (S // N) + token) * H + h) * V
    for begin in range(0, V, BV):
        v = begin + tl.arange(0, BV)
        whole = (v < V)[:, None] & (k < K)[None, :]
        state = tl.load(STATES + (row // 64) * V * K + (v * K)[:, None] + k[None, :], whole, other=0.0)
        u = tl.load(CORRECTED + row * V + (q * V)[:, None] + v[None, :], tl.broadcast_to((v < V)[None, :], (64, BV)), other=0.0)
        o = tl.dot(query, tl.trans(state.to(DOT)), input_precision=PRECISION)
        if TWO:
            whole = (v < V)[:, None] & (BK + k < K)[None, :]
            state = tl.load(STATES + (row // 64) * V * K + BK + (v * K)[:, None] + k[None, :], whole, other=0.0)
            o = tl.dot(query_other.to(DOT), tl.trans(state.to(DOT)), acc=o, input_precision=PRECISION)
        o = o * (before * rq)[:, None]
        o = tl.where((document == 0)[:, None], o, 0.0)
        o = tl.dot(scores, u.to(DOT), acc=o, input_precision=PRECISION)
        if MARK:
            if last > 0:
                if not all_finite(o):
                    tl.store(LOST + row // 64 // chunks, 1)
        tl.store(O + to + (rows * (H * V))[:, None] + v[None, :], o.to(O.dtype.element_ty), read[:, None] & (v < V)[None, :])


@triton.jit
def recover(
    X, Y, VALUES, G, BETA, STARTS, FIRST, O, LAST, LOST, scale, T, H, R, K, V, x_b, x_t, x_g, y_b, y_t, y_g, v_b, v_t, v_h, g_b, g_t, g_h, b_b, b_t, b_h,
    s_b, s_t, HAS_G: tl.constexpr, NORM: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The definition, step by step, of the heads marked LOST; the others' programs end at once."""
    tiles = tl.cdiv(V, BV)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    if tl.load(LOST + bh) != 0:
        k, v = tl.arange(0, BK), tl.program_id(0) % tiles * BV + tl.arange(0, BV)
        inside, place = (v < V)[:, None] & (k < K)[None, :], bh * V * K + v[:, None] * K + k[None, :]
        state = tl.load(FIRST + place, inside, other=0.0)
        for step in range(0, T):
            t = b * 0 + step
            state = tl.where(tl.load(STARTS + b * s_b + t * s_t) != 0, 0.0, state)
            if HAS_G:
                gate = tl.load(G + b * g_b + t * g_t + h * g_h).to(tl.float32)
                state = tl.where(gate < -87.0, 0.0, state * tl.exp(gate))
            for update in range(0, N):
                s = t * N + update
                key = tl.load(X + b * x_b + s * x_t + h // R * x_g + k, k < K, other=0.0).to(tl.float32)
                if NORM:
                    key *= tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
                value = tl.load(VALUES + b * v_b + s * v_t + h * v_h + v, v < V, other=0.0).to(tl.float32)
                strength = tl.load(BETA + b * b_b + s * b_t + h * b_h).to(tl.float32)
                wrong = value - tl.sum(state * key[None, :], 1)
                state += (strength * wrong)[:, None] * key[None, :]
            query = tl.load(Y + b * y_b + t * y_t + h // R * y_g + k, k < K, other=0.0).to(tl.float32)
            if NORM:
                query *= tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
            o = tl.sum(state * query[None, :], 1) * scale
            tl.store(O + ((b * T + t) * H + h) * V + v, o.to(O.dtype.element_ty), v < V)
        tl.store(LAST + place, state, inside)
