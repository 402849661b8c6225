"""Triton kernels of Mamba-2's scan (arXiv 2405.21060, section 6), forward and backward; `launch.py` runs them.

Time is cut into chunks of Q steps. `prepare` sums the logarithms of the decays within each chunk, `walk` carries the state from chunk to chunk
(and, mirrored, the gradient of the state), keeping what enters every chunk; `outputs`, `query_gradients` and
`key_gradients` then take all chunks at once, each program some heads of a group one after the other, so that B and C are read, and their product formed, once for all of them.

Of step t in a chunk: total_t = sum_{s<=t} dt_s A, always used as exp of a difference that is zero or below. document_t counts the starts up to
t in the chunk; nothing passes between steps of unequal counts. Steps past the end have dt = 0: they decay nothing and add nothing.
Where totals are large and their differences small, fp32 totals are not enough: FINE adds LOW, what rounding took from them.

Legend: b batch row, c chunk, h head, g group, i row of a chunk (its output), j row of a chunk (its input), Q, P, N as in reference.py.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


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
    if FINE:
        total = tl.cumsum(dt.to(tl.float64) * a.to(tl.float64)[None, :], 0)
        high = total.to(tl.float32)
        tl.store(TOTAL + place, high, (h < H)[None, :])
        tl.store(LOW + place, (total - high.to(tl.float64)).to(tl.float32), (h < H)[None, :])
    else:
        tl.store(TOTAL + place, tl.cumsum(dt * a[None, :], 0), (h < H)[None, :])
    if HAS_STARTS:
        if tl.program_id(1) == 0:
            new = tl.load(STARTS + b * starts_b + t * starts_t, t < T, other=0).to(tl.int32)
            tl.store(DOCUMENT + b * (chunks * Q) + t, tl.cumsum(new, 0))


@triton.jit
def walk(
    X, K, STEP, TOTAL, LOW, DOCUMENT, FIRST, STATES, LAST, ENTERING, PASSED, T, H, R, chunks, P, N, x_b, x_t, x_h, k_b, k_t, k_g,
    HAS_STARTS: tl.constexpr, FINE: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
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
    state = tl.load(FIRST + (b * H + h) * P * N + place, inside, other=0.0)
    for k in range(0, chunks):
        c = b * 0 + (chunks - 1 - k if REVERSE else k)
        t = c * Q + q
        x = tl.load(X + (b * x_b + c * Q * x_t + h * x_h) + q[None, :] * x_t + p[:, None], (p < P)[:, None] & (t < T)[None, :], other=0.0)
        key = tl.load(K + (b * k_b + c * Q * k_t + h // R * k_g) + q[:, None] * k_t + n[None, :], (t < T)[:, None] & (n < N)[None, :], other=0.0)
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
            weight = tl.where(document == (0 if REVERSE else last), weight, 0.0)
            through = tl.where(last == 0, through, 0.0)
        entry = (b * chunks + c) * H + h
        tl.store(STATES + entry * P * N + place, state.to(STATES.dtype.element_ty), inside)
        if REVERSE:
            entering = tl.load(ENTERING + entry * P * N + place, inside, other=0.0).to(tl.float32)
            tl.store(PASSED + (entry * tiles_n + tile % tiles_n) * P + p, tl.sum(entering * state, 1) * through, p < P)
        weighted = (x.to(tl.float32) * weight[None, :]).to(DOT)
        state = tl.dot(weighted, key.to(DOT), acc=state * through, input_precision=PRECISION)
    tl.store(LAST + (b * H + h) * P * N + place, state, inside)


@triton.jit
def outputs(
    X, BM, CM, D, STEP, TOTAL, LOW, DOCUMENT, STATES, Y, T, H, R, blocks, chunks, P, N, x_b, x_t, x_h, b_b, b_t, b_g, c_b, c_t, c_g,
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
        tl.store(Y + ((b * T + first) * H + h) * P + q[:, None] * (H * P) + p[None, :], y.to(Y.dtype.element_ty), rows_p)


@triton.jit
def query_gradients(
    X, DY, BM, CM, STEP, TOTAL, LOW, DOCUMENT, STATES, D_SCORES, D_C, D_D, AFTER, WITHIN, T, H, R, blocks, chunks, P, N,
    x_b, x_t, x_h, y_b, y_t, y_h, b_b, b_t, b_g, c_b, c_t, c_g,
    HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What outputs ask for. Summed over the heads of this program: gradients of C and of the products C_i . B_j. D's gradient per chunk.

    With M_ij = (C_i . B_j) exp(total_i - total_j) (x_j . dy_i): WITHIN_j = sum_i M_ij, and AFTER_i = sum_j dt_j M_ij - dt_i WITHIN_i + dy_i . (what
    the entering state gives to y_i). The sum of AFTER over i >= t is what outputs in the chunk ask of the logarithm of step t's decay.
    """
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    first = b * 0 + c * Q
    t = first + q
    rows_n, rows_p, inside = (t < T)[:, None] & (n < N)[None, :], (t < T)[:, None] & (p < P)[None, :], (p < P)[:, None] & (n < N)[None, :]
    query = tl.load(CM + (b * c_b + first * c_t + g * c_g) + q[:, None] * c_t + n[None, :], rows_n, other=0.0).to(DOT)
    key = tl.load(BM + (b * b_b + first * b_t + g * b_g) + q[:, None] * b_t + n[None, :], rows_n, other=0.0).to(DOT)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    allowed = q[:, None] >= q[None, :]
    if HAS_STARTS:
        document = tl.load(DOCUMENT + b * (chunks * Q) + t)
        allowed = allowed & (document[:, None] == document[None, :])
    d_query, d_scores = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, Q), tl.float32)
    for k in tl.range(0, tl.minimum(HEADS, R - block * HEADS), num_stages=STAGES):
        h = g * R + block * HEADS + k
        row = (b * H + h) * (chunks * Q) + first
        x = tl.load(X + (b * x_b + first * x_t + h * x_h) + q[:, None] * x_t + p[None, :], rows_p, other=0.0).to(DOT)
        dy = tl.load(DY + (b * y_b + first * y_t + h * y_h) + q[:, None] * y_t + p[None, :], rows_p, other=0.0).to(DOT)
        state = tl.load(STATES + ((b * chunks + c) * H + h) * P * N + p[:, None] * N + n[None, :], inside, other=0.0)
        total, step = tl.load(TOTAL + row + q), tl.load(STEP + row + q)
        gap, left = total[:, None] - total[None, :], tl.exp(total)
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[:, None] - low[None, :]
        if HAS_STARTS:
            left = tl.where(document == 0, left, 0.0)
        pairs = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * tl.exp(tl.where(allowed, gap, float("-inf")))
        if HAS_SKIP:
            tl.store(D_D + (b * chunks + c) * H + h, tl.sum(tl.sum(tl.where(q[:, None] == q[None, :], pairs, 0.0), 1), 0))
        d_scores += pairs * step[None, :]
        pairs *= scores
        within = tl.sum(pairs, 0)
        after = tl.sum(pairs * step[None, :], 1) - within * step
        after += tl.sum(tl.dot(query, tl.trans(state), input_precision=PRECISION) * dy.to(tl.float32), 1) * left
        d_query += tl.dot(dy, state, input_precision=PRECISION) * left[:, None]  # scaled after: rounding a scaled operand would show
        tl.store(AFTER + row + q, after)
        tl.store(WITHIN + row + q, within)
    share = (b * chunks + c) * tl.num_programs(1) + tl.program_id(1)
    tl.store(D_SCORES + share * (Q * Q) + q[:, None] * Q + q[None, :], d_scores.to(D_SCORES.dtype.element_ty))
    d_query = tl.dot(d_scores.to(DOT), key, acc=d_query, input_precision=PRECISION)
    place = ((b * T + first) * tl.num_programs(1) + tl.program_id(1)) * N + q[:, None] * (tl.num_programs(1) * N) + n[None, :]
    tl.store(D_C + place, d_query.to(D_C.dtype.element_ty), rows_n)


@triton.jit
def key_gradients(
    X, DY, BM, CM, A, D, STEP, TOTAL, LOW, DOCUMENT, D_STATES, D_SCORES, PASSED, AFTER, WITHIN, DX, D_DT, D_A, D_B,
    parts, T, H, R, blocks, chunks, P, N, x_b, x_t, x_h, y_b, y_t, y_h, b_b, b_t, b_g, c_b, c_t, c_g,
    HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What is asked of inputs: gradients of x and dt, of A per chunk, and of B summed over the heads of this program. Matrices lie (j, i).

    The logarithm of step t's decay also acts on what inputs j < t give to the leaving state, and on what passes through the chunk.
    """
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    first = b * 0 + c * Q
    t = first + q
    rows_n, rows_p, inside = (t < T)[:, None] & (n < N)[None, :], (t < T)[:, None] & (p < P)[None, :], (p < P)[:, None] & (n < N)[None, :]
    query = tl.load(CM + (b * c_b + first * c_t + g * c_g) + q[:, None] * c_t + n[None, :], rows_n, other=0.0).to(DOT)
    key = tl.load(BM + (b * b_b + first * b_t + g * b_g) + q[:, None] * b_t + n[None, :], rows_n, other=0.0).to(DOT)
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    share = (b * chunks + c) * tl.num_programs(1) + tl.program_id(1)
    d_scores = tl.load(D_SCORES + share * (Q * Q) + q[None, :] * Q + q[:, None])
    d_key = tl.dot(d_scores, query, input_precision=PRECISION)
    allowed = q[:, None] <= q[None, :]
    if HAS_STARTS:
        document = tl.load(DOCUMENT + b * (chunks * Q) + t)
        last = tl.load(DOCUMENT + b * (chunks * Q) + first + Q - 1)
        allowed = allowed & (document[:, None] == document[None, :])
    for k in tl.range(0, tl.minimum(HEADS, R - block * HEADS), num_stages=STAGES):
        h = g * R + block * HEADS + k
        row = (b * H + h) * (chunks * Q) + first
        place = ((b * chunks + c) * H + h) * P * N + p[:, None] * N + n[None, :]
        x = tl.load(X + (b * x_b + first * x_t + h * x_h) + q[:, None] * x_t + p[None, :], rows_p, other=0.0).to(DOT)
        dy = tl.load(DY + (b * y_b + first * y_t + h * y_h) + q[:, None] * y_t + p[None, :], rows_p, other=0.0).to(DOT)
        d_state = tl.load(D_STATES + place, inside, other=0.0)
        total, step, end = tl.load(TOTAL + row + q), tl.load(STEP + row + q), tl.load(TOTAL + row + Q - 1)
        gap, to_end = total[None, :] - total[:, None], end - total
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[None, :] - low[:, None]
            to_end += tl.load(LOW + row + Q - 1) - low
        right = tl.exp(to_end)
        if HAS_STARTS:
            right = tl.where(document == last, right, 0.0)
        weight = (scores * tl.exp(tl.where(allowed, gap, float("-inf")))).to(DOT)
        dx = tl.dot(key, tl.trans(d_state), input_precision=PRECISION) * right[:, None]
        added = tl.sum(dx * x.to(tl.float32), 1)
        d_key += tl.dot(x, d_state, input_precision=PRECISION) * (right * step)[:, None]
        dx = tl.dot(weight, dy, acc=dx, input_precision=PRECISION) * step[:, None]
        if HAS_SKIP:
            dx += dy.to(tl.float32) * tl.load(D + h)
        tl.store(DX + ((b * T + first) * H + h) * P + q[:, None] * (H * P) + p[None, :], dx.to(DX.dtype.element_ty), rows_p)
        part = tl.arange(0, PARTS)
        passed = tl.sum(tl.load(PASSED + ((b * chunks + c) * H + h) * parts + part, part < parts, other=0.0), 0)
        after, before = tl.load(AFTER + row + q), added * step
        d_decay = tl.cumsum(after, 0, reverse=True) + tl.cumsum(before, 0) - before + passed
        tl.store(D_DT + (b * T + t) * H + h, tl.load(WITHIN + row + q) + added + d_decay * tl.load(A + h), t < T)
        tl.store(D_A + (b * chunks + c) * H + h, tl.sum(d_decay * step, 0))
    place = ((b * T + first) * tl.num_programs(1) + tl.program_id(1)) * N + q[:, None] * (tl.num_programs(1) * N) + n[None, :]
    tl.store(D_B + place, d_key.to(D_B.dtype.element_ty), rows_n)
