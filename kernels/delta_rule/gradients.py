"""Triton kernels of the delta rule's backward pass; names and legend as in `triton.py`.

`local` gives what outputs ask of the corrected values of their own chunk; `walk_back` carries the gradient of the state from the last chunk to the
first, with what the states after ask of the corrected values; `pair_gradients`, `query_gradients` and `key_gradients` then take all chunks at once.

With R = (I + L)^-T du, the gradient of what the triangular system is solved for: dv = b R and dL = -R u^T. A gate's gradient is the sum of what all
pairs ask whose decay it is part of: sums over rows less sums over columns, from the end, in fp64, as they cancel. b's gradient is R_i . u_i / b_i,
where b is not small: summed over pairs it would lose the digits of what keys that repeat cancel.
CORRECTED holds u over the norms of keys, as `walk` leaves it.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.delta_rule.triton import columns_of, decays, inverse_norms, inverse_norms_of_both, rows_of, sums_of, where_is


@triton.jit
def local(
    X, Y, DO, TOTAL, DOCUMENT, RK, RQ, DU, scale, S, H, R, chunks, K, V, x_b, x_t, x_g, y_b, y_t, y_g, o_b, o_t, o_h,
    NORM: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """du_j = sum_{i>=j} D_ij (q_i . k_j) do_i, (B, H, chunks Q, V), and RQ."""
    row, b, h, _, first = where_is(chunks, H)
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
    rk = tl.load(RK + row + q)
    if TWO:
        query_other = columns_of(Y + (b * y_b + token * y_t + h // R * y_g), rows * y_t, read, BK + k, K)
        rq = inverse_norms_of_both(query, query_other, NORM)
    else:
        rq = inverse_norms(query, NORM)
    tl.store(RQ + row + q, rq)
    rq, query = rq * scale, query.to(DOT)
    keys = keys.to(DOT)
    pairs, _, _, _ = decays(sums)
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if TWO:
        other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K)
        scores = tl.dot(query_other.to(DOT), tl.trans(other.to(DOT)), acc=scores, input_precision=PRECISION)
    scores = scores * pairs * rq[:, None] * rk[None, :]
    scores = tl.trans(tl.where(pairs != 0.0, scores, 0.0).to(DOT))
    for begin in range(0, V, BV):
        v = begin + tl.arange(0, BV)
        do = tl.load(
            DO + (b * o_b + token * o_t + h * o_h) + (rows * o_t)[:, None] + v[None, :], read[:, None] & (v < V)[None, :], other=0.0
        )
        du = tl.dot(scores, do.to(DOT), input_precision=PRECISION)
        tl.store(DU + row * V + (q * V)[:, None] + v[None, :], du.to(DU.dtype.element_ty), tl.broadcast_to((v < V)[None, :], (64, BV)))


@triton.jit
def walk_back(
    X, Y, DO, TOTAL, DOCUMENT, RK, RQ, W, DU, LATER, D_STATES, FIRST, scale, S, H, R, chunks, K, V, x_b, x_t, x_g, y_b, y_t, y_g, o_b, o_t, o_h,
    KEEP: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """The gradient of the state leaving every chunk, and FIRST, that of h0, from that of the last state, LATER; completes DU. KEEP: all of it, else
    that of h0 only."""
    tiles = tl.cdiv(V, BV)
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    q, k, v = tl.arange(0, 64), tl.arange(0, BK), tl.program_id(0) % tiles * BV + tl.arange(0, BV)
    inside, place = (v < V)[:, None] & (k < K)[None, :], v[:, None] * K + k[None, :]
    state = tl.load(LATER + bh * V * K + place, inside, other=0.0)
    if TWO:
        inside_other = (v < V)[:, None] & (BK + k < K)[None, :]
        state_other = tl.load(LATER + bh * V * K + BK + place, inside_other, other=0.0)
    for back in range(0, chunks):
        c = bh * 0 + chunks - 1 - back
        row, first = (bh * chunks + c) * 64, c * 64
        token, rows, update, within = rows_of(first, S, N)
        read = within & (update == N - 1)
        # These before the tiles: loads keep their order, and behind the tiles they would wait a second time for memory.
        total, document, rk = tl.load(TOTAL + row + q), tl.load(DOCUMENT + row + q), tl.load(RK + row + q)
        end, last, rq = tl.load(TOTAL + row + 63), tl.load(DOCUMENT + row + 63), tl.load(RQ + row + q) * scale
        keys = tl.load(
            X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :], within[:, None] & (k < K)[None, :], other=0.0
        )
        query = tl.load(
            Y + (b * y_b + token * y_t + h // R * y_g) + (rows * y_t)[:, None] + k[None, :], read[:, None] & (k < K)[None, :], other=0.0
        )
        do = tl.load(
            DO + (b * o_b + token * o_t + h * o_h) + (rows * o_t)[:, None] + v[None, :], read[:, None] & (v < V)[None, :], other=0.0
        )
        w = tl.load(W + row * K + (q * K)[:, None] + k[None, :], tl.broadcast_to((k < K)[None, :], (64, BK)), other=0.0)
        mine = tl.broadcast_to((v < V)[None, :], (64, BV))
        du = tl.load(DU + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0).to(tl.float32)
        low = state.to(D_STATES.dtype.element_ty)
        if KEEP:
            tl.store(D_STATES + (bh * chunks + c) * V * K + place, low, inside)
            if TWO:
                tl.store(D_STATES + (bh * chunks + c) * V * K + BK + place, state_other.to(D_STATES.dtype.element_ty), inside_other)
        after = tl.exp(tl.where(document == last, (end - total).to(tl.float32), float("-inf"))) * rk
        asked = tl.dot(keys.to(DOT), tl.trans(low.to(DOT)), input_precision=PRECISION)
        if TWO:
            other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, within, BK + k, K)
            asked = tl.dot(other.to(DOT), tl.trans(state_other.to(DOT)), acc=asked, input_precision=PRECISION)
        asked = asked * after[:, None]
        du += tl.where((document == last)[:, None], asked, 0.0)
        if KEEP:
            tl.store(DU + row * V + (q * V)[:, None] + v[None, :], du.to(DU.dtype.element_ty), mine)
        before = tl.exp(tl.where(document == 0, total.to(tl.float32), float("-inf"))) * rq
        kept = tl.where(last == 0, state * tl.exp(end.to(tl.float32)), 0.0)
        asked = tl.where((document == 0)[:, None], do.to(tl.float32) * before[:, None], 0.0)
        taken = tl.where((document == 0)[:, None], -du, 0.0)
        state = tl.dot(tl.trans(asked.to(DOT)), query.to(DOT), acc=kept, input_precision=PRECISION)
        state = tl.dot(tl.trans(taken.to(DOT)), w.to(DOT), acc=state, input_precision=PRECISION)
        if TWO:
            kept = tl.where(last == 0, state_other * tl.exp(end.to(tl.float32)), 0.0)
            query_other = columns_of(Y + (b * y_b + token * y_t + h // R * y_g), rows * y_t, read, BK + k, K)
            w_other = tl.load(W + row * K + BK + (q * K)[:, None] + k[None, :], tl.broadcast_to((BK + k < K)[None, :], (64, BK)), other=0.0)
            state_other = tl.dot(tl.trans(asked.to(DOT)), query_other.to(DOT), acc=kept, input_precision=PRECISION)
            state_other = tl.dot(tl.trans(taken.to(DOT)), w_other.to(DOT), acc=state_other, input_precision=PRECISION)
    tl.store(FIRST + bh * V * K + place, state, inside)
    if TWO:
        tl.store(FIRST + bh * V * K + BK + place, state_other, inside_other)


@triton.jit
def pair_gradients(
    X, Y, VALUES, DO, TOTAL, DOCUMENT, RK, RQ, STEP, INVERSE, CORRECTED, DU, RIGHT, D_SCORES, D_PRODUCTS, D_V, ROWS, STRENGTH, scale,
    S, H, R, chunks, K, V, x_b, x_t, x_g, y_b, y_t, y_g, v_b, v_t, v_h, o_b, o_t, o_h, d_v,
    N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """R (B, H, chunks Q, V), dv, and the gradients of the products q_i . k_j and (added to its mirror image) k_i . k_j. ROWS: what is asked of the gates
    by pairs, STRENGTH: the gradient of b, where it is small without what comes through the state."""
    row, b, h, _, first = where_is(chunks, H)
    q, k = tl.arange(0, 64), tl.arange(0, BK)
    token, rows, update, inside = rows_of(first, S, N)
    read = inside & (update == N - 1)
    inverse = tl.trans(tl.load(INVERSE + row * 64 + (q * 64)[:, None] + q[None, :]).to(DOT))
    step, rk, rq = tl.load(STEP + row + q), tl.load(RK + row + q), tl.load(RQ + row + q) * scale
    d_scores, d_system = tl.zeros((64, 64), tl.float32), tl.zeros((64, 64), tl.float32)
    by_values, by_corrected = tl.zeros((64,), tl.float32), tl.zeros((64,), tl.float32)
    for begin in range(0, V, BV):
        v = begin + tl.arange(0, BV)
        mine = tl.broadcast_to((v < V)[None, :], (64, BV))
        do = tl.load(
            DO + (b * o_b + token * o_t + h * o_h) + (rows * o_t)[:, None] + v[None, :], read[:, None] & (v < V)[None, :], other=0.0
        )
        du = tl.load(DU + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0)
        u = tl.load(CORRECTED + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0).to(DOT)
        values = tl.load(
            VALUES + (b * v_b + first * v_t + h * v_h) + (q * v_t)[:, None] + v[None, :], inside[:, None] & (v < V)[None, :], other=0.0
        )
        right = tl.dot(inverse, du.to(DOT), input_precision=PRECISION)
        tl.store(RIGHT + row * V + (q * V)[:, None] + v[None, :], right.to(RIGHT.dtype.element_ty), mine)
        by_values += tl.sum(right * values.to(tl.float32), 1)
        by_corrected += tl.sum(right * u.to(tl.float32), 1)
        place = D_V + ((b * S + first) * d_v + h * V) + (q * d_v)[:, None] + v[None, :]
        tl.store(place, (right * step[:, None]).to(D_V.dtype.element_ty), inside[:, None] & (v < V)[None, :])
        d_scores = tl.dot(do.to(DOT), tl.trans(u), acc=d_scores, input_precision=PRECISION)
        d_system = tl.dot(right.to(DOT), tl.trans(u), acc=d_system, input_precision=PRECISION)
    query = tl.load(
        Y + (b * y_b + token * y_t + h // R * y_g) + (rows * y_t)[:, None] + k[None, :], read[:, None] & (k < K)[None, :], other=0.0
    ).to(DOT)
    keys = tl.load(
        X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :], inside[:, None] & (k < K)[None, :], other=0.0
    ).to(DOT)
    pairs, _, _, _ = decays(sums_of(TOTAL, DOCUMENT, row))
    d_scores = tl.where(pairs != 0.0, d_scores * pairs * rq[:, None], 0.0)
    d_system = tl.where((pairs != 0.0) & (q[:, None] > q[None, :]), -d_system * pairs * rk[:, None], 0.0)
    of_keys = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
    if TWO:
        other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K).to(DOT)
        of_keys = tl.dot(other, tl.trans(other), acc=of_keys, input_precision=PRECISION)
    asked = d_system * of_keys
    strength = tl.where(step > 0.01, by_corrected / tl.where(step > 0.01, step * rk, 1.0), by_values + tl.sum(asked, 1))
    tl.store(STRENGTH + row + q, strength)
    d_system *= step[:, None]
    of_queries = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if TWO:
        query_other = columns_of(Y + (b * y_b + token * y_t + h // R * y_g), rows * y_t, read, BK + k, K).to(DOT)
        of_queries = tl.dot(query_other, tl.trans(other), acc=of_queries, input_precision=PRECISION)
    asked = asked * step[:, None] + d_scores * of_queries
    tl.store(ROWS + row + q, tl.sum(asked.to(tl.float64), 1) - tl.sum(asked.to(tl.float64), 0))
    square = row * 64 + (q * 64)[:, None] + q[None, :]
    tl.store(D_SCORES + square, d_scores.to(D_SCORES.dtype.element_ty))
    tl.store(D_PRODUCTS + square, (d_system + tl.trans(d_system)).to(D_PRODUCTS.dtype.element_ty))


@triton.jit
def query_gradients(
    X, Y, DO, TOTAL, DOCUMENT, RQ, STATES, D_SCORES, ROWS, D_Q, scale, S, H, R, chunks, K, V, x_b, x_t, x_g, y_b, y_t, y_g, o_b, o_t, o_h, d_q,
    NORM: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """dq (B, T, H, K) of every value head, rows d_q apart; adds to ROWS what is asked of the gates by what comes through the state."""
    row, b, h, _, first = where_is(chunks, H)
    q, k = tl.arange(0, 64), tl.arange(0, BK)
    token, rows, update, inside = rows_of(first, S, N)
    read = inside & (update == N - 1)
    d_query = tl.zeros((64, BK), tl.float32)
    if TWO:
        d_other = tl.zeros((64, BK), tl.float32)
    for begin in range(0, V, BV):
        v = begin + tl.arange(0, BV)
        place = (row // 64) * V * K + (v * K)[:, None] + k[None, :]
        state = tl.load(STATES + place, (v < V)[:, None] & (k < K)[None, :], other=0.0)
        do = tl.load(
            DO + (b * o_b + token * o_t + h * o_h) + (rows * o_t)[:, None] + v[None, :], read[:, None] & (v < V)[None, :], other=0.0
        )
        d_query = tl.dot(do.to(DOT), state.to(DOT), acc=d_query, input_precision=PRECISION)
        if TWO:
            state = tl.load(STATES + BK + place, (v < V)[:, None] & (BK + k < K)[None, :], other=0.0)
            d_other = tl.dot(do.to(DOT), state.to(DOT), acc=d_other, input_precision=PRECISION)
    keys = tl.load(
        X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :], inside[:, None] & (k < K)[None, :], other=0.0
    )
    query = tl.load(
        Y + (b * y_b + token * y_t + h // R * y_g) + (rows * y_t)[:, None] + k[None, :], read[:, None] & (k < K)[None, :], other=0.0
    )
    d_scores = tl.load(D_SCORES + row * 64 + (q * 64)[:, None] + q[None, :]).to(DOT)
    document, rq = tl.load(DOCUMENT + row + q), tl.load(RQ + row + q)
    before = tl.exp(tl.where(document == 0, tl.load(TOTAL + row + q).to(tl.float32), float("-inf")))
    d_query = tl.where((document == 0)[:, None], d_query * (before * rq * scale)[:, None], 0.0)
    asked = tl.sum(query.to(tl.float32) * d_query, 1)
    if TWO:
        other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K)
        query_other = columns_of(Y + (b * y_b + token * y_t + h // R * y_g), rows * y_t, read, BK + k, K)
        d_other = tl.where((document == 0)[:, None], d_other * (before * rq * scale)[:, None], 0.0)
        asked += tl.sum(query_other.to(tl.float32) * d_other, 1)
    tl.store(ROWS + row + q, tl.load(ROWS + row + q) + asked.to(tl.float64))
    d_query = tl.dot(d_scores, keys.to(DOT), acc=d_query, input_precision=PRECISION)
    along = tl.sum(query.to(tl.float32) * d_query, 1)
    to = D_Q + ((b * (S // N) + token) * d_q + h * K) + (rows * d_q)[:, None] + k[None, :]
    if TWO:
        d_other = tl.dot(d_scores, other.to(DOT), acc=d_other, input_precision=PRECISION)
        along += tl.sum(query_other.to(tl.float32) * d_other, 1)
        if NORM:
            d_other -= query_other.to(tl.float32) * (rq * rq * along)[:, None]
        tl.store(to + BK, d_other.to(D_Q.dtype.element_ty), read[:, None] & (BK + k < K)[None, :])
    if NORM:
        d_query -= query.to(tl.float32) * (rq * rq * along)[:, None]
    tl.store(to, d_query.to(D_Q.dtype.element_ty), read[:, None] & (k < K)[None, :])


@triton.jit
def _of_one_document(later, its_document, x, document):
    """Of a sum from the end of a chunk: x, and what was summed of later sub-steps if they are of the same document."""
    return tl.where(its_document == document, later + x, x), document


@triton.jit
def key_gradients(
    X, Y, TOTAL, DOCUMENT, RK, STEP, STATES, D_STATES, CORRECTED, RIGHT, D_SCORES, D_PRODUCTS, ROWS, STRENGTH, D_K, D_G, D_BETA,
    S, H, R, chunks, K, V, x_b, x_t, x_g, y_b, y_t, y_g, d_k,
    HAS_G: tl.constexpr, NORM: tl.constexpr, N: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """dk (B, S, H, K) of every value head, rows d_k apart, dg (B, T, H) and d beta (B, S, H). One sum of products: first what comes through the
    state before the chunk, then, onto it, what comes through the state after it."""
    row, b, h, _, first = where_is(chunks, H)
    q, k = tl.arange(0, 64), tl.arange(0, BK)
    token, rows, update, inside = rows_of(first, S, N)
    total, document = tl.load(TOTAL + row + q), tl.load(DOCUMENT + row + q)
    end, last = tl.load(TOTAL + row + 63), tl.load(DOCUMENT + row + 63)
    step, rk = tl.load(STEP + row + q), tl.load(RK + row + q)
    keys = tl.load(
        X + (b * x_b + first * x_t + h // R * x_g) + (q * x_t)[:, None] + k[None, :], inside[:, None] & (k < K)[None, :], other=0.0
    )
    d_key, whole = tl.zeros((64, BK), tl.float32), tl.zeros((BV,), tl.float32)
    if TWO:
        d_other = tl.zeros((64, BK), tl.float32)
    for begin in range(0, V, BV):
        v = begin + tl.arange(0, BV)
        mine = tl.broadcast_to((v < V)[None, :], (64, BV))
        place = (row // 64) * V * K + (v * K)[:, None] + k[None, :]
        state = tl.load(STATES + place, (v < V)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(RIGHT + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0)
        d_key = tl.dot(right.to(DOT), state.to(DOT), acc=d_key, input_precision=PRECISION)
        if TWO:
            state = tl.load(STATES + BK + place, (v < V)[:, None] & (BK + k < K)[None, :], other=0.0)
            d_other = tl.dot(right.to(DOT), state.to(DOT), acc=d_other, input_precision=PRECISION)
    before = tl.exp(tl.where(document == 0, total.to(tl.float32), float("-inf")))
    after = tl.exp(tl.where(document == last, (end - total).to(tl.float32), float("-inf")))
    d_key = tl.where((document == 0)[:, None], d_key * (before * rk)[:, None], 0.0)
    taken = tl.sum(keys.to(tl.float32) * d_key, 1)
    if TWO:
        other = columns_of(X + (b * x_b + first * x_t + h // R * x_g), q * x_t, inside, BK + k, K)
        d_other = tl.where((document == 0)[:, None], d_other * (before * rk)[:, None], 0.0)
        taken += tl.sum(other.to(tl.float32) * d_other, 1)
        d_other *= -step[:, None]
    tl.store(D_BETA + ((b * S + first) * H + h) + q * H, tl.load(STRENGTH + row + q) - tl.where(step > 0.01, 0.0, taken), inside)
    d_key *= -step[:, None]
    for begin in range(0, V, BV):
        v = begin + tl.arange(0, BV)
        within, mine = (v < V)[:, None] & (k < K)[None, :], tl.broadcast_to((v < V)[None, :], (64, BV))
        place = (row // 64) * V * K + (v * K)[:, None] + k[None, :]
        d_state = tl.load(D_STATES + place, within, other=0.0)
        u = tl.load(CORRECTED + row * V + (q * V)[:, None] + v[None, :], mine, other=0.0)
        if HAS_G:
            whole += tl.sum(tl.load(STATES + place, within, other=0.0).to(tl.float32) * d_state.to(tl.float32), 1)
        added = tl.where((document == last)[:, None], u.to(tl.float32) * after[:, None], 0.0)
        d_key = tl.dot(added.to(DOT), d_state.to(DOT), acc=d_key, input_precision=PRECISION)
        if TWO:
            within = (v < V)[:, None] & (BK + k < K)[None, :]
            d_state = tl.load(D_STATES + BK + place, within, other=0.0)
            if HAS_G:
                whole += tl.sum(tl.load(STATES + BK + place, within, other=0.0).to(tl.float32) * d_state.to(tl.float32), 1)
            d_other = tl.dot(added.to(DOT), d_state.to(DOT), acc=d_other, input_precision=PRECISION)
    if HAS_G:
        given = tl.sum(keys.to(tl.float32) * d_key, 1) + taken * step
        if TWO:
            given += tl.sum(other.to(tl.float32) * d_other, 1)
        asked = tl.load(ROWS + row + q) - (taken * step + given).to(tl.float64)
        through = tl.where(last == 0, tl.sum(whole, 0) * tl.exp(end.to(tl.float32)), 0.0) + tl.sum(given, 0)
        later, _ = tl.associative_scan((asked, document), 0, _of_one_document, reverse=True)
        d_gate = later + tl.where(document == last, through, 0.0).to(tl.float64)
        previous = tl.load(DOCUMENT + row + q - 1, q > 0, other=0)
        d_gate = tl.where(document == previous, d_gate, 0.0)
        tl.store(D_G + ((b * (S // N) + token) * H + h) + rows * H, d_gate.to(tl.float32), inside & (update == 0))
    read = inside & (update == N - 1)
    query = tl.load(
        Y + (b * y_b + token * y_t + h // R * y_g) + (rows * y_t)[:, None] + k[None, :], read[:, None] & (k < K)[None, :], other=0.0
    )
    square = row * 64 + (q * 64)[:, None] + q[None, :]
    d_scores, d_products = tl.trans(tl.load(D_SCORES + square).to(DOT)), tl.load(D_PRODUCTS + square).to(DOT)
    d_key = tl.dot(d_scores, query.to(DOT), acc=d_key, input_precision=PRECISION)
    d_key = tl.dot(d_products, keys.to(DOT), acc=d_key, input_precision=PRECISION)
    wide = keys.to(tl.float32)
    along = rk * rk * tl.sum(wide * d_key, 1)
    to = D_K + ((b * S + first) * d_k + h * K) + (q * d_k)[:, None] + k[None, :]
    if TWO:
        query = columns_of(Y + (b * y_b + token * y_t + h // R * y_g), rows * y_t, read, BK + k, K)
        d_other = tl.dot(d_scores, query.to(DOT), acc=d_other, input_precision=PRECISION)
        d_other = tl.dot(d_products, other.to(DOT), acc=d_other, input_precision=PRECISION)
        along += rk * rk * tl.sum(other.to(tl.float32) * d_other, 1)
        if NORM:
            d_other -= other.to(tl.float32) * along[:, None]
        tl.store(to + BK, d_other.to(D_K.dtype.element_ty), inside[:, None] & (BK + k < K)[None, :])
    if NORM:
        d_key -= wide * along[:, None]
    tl.store(to, d_key.to(D_K.dtype.element_ty), inside[:, None] & (k < K)[None, :])
