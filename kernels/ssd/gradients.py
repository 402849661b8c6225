"""Triton kernels of the backward pass of Mamba-2's scan, for all widths; small.py has others for narrow heads and states. Legend: see triton.py."""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def query_gradients(
    X, DY, BM, CM, STEP, TOTAL, LOW, DOCUMENT, STATES, D_SCORES, D_C, D_D, AFTER, WITHIN, T, H, R, blocks, chunks, P, N,
    x_b, x_t, x_h, y_b, y_t, y_h, b_b, b_t, b_g, c_b, c_t, c_g,
    HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What outputs ask for. Summed over the heads of this program: gradients of C and of the products C_i . B_j. D's gradient per chunk.

    With M_ij = (C_i . B_j) exp(total_i - total_j) (x_j . dy_i): WITHIN_j = sum_i M_ij, and AFTER_t, which outputs in the chunk ask of the logarithm
    of step t's decay, is the sum of dt_j M_ij over j < t <= i, and of dy_i . (what the entering state gives to y_i) over i >= t. As a difference
    of sums over rows and columns it would lose the digits of small steps beside a large one.
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
        gap = total[:, None] - total[None, :]
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[:, None] - low[None, :]
        pairs = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * tl.exp(tl.where(allowed, gap, float("-inf")))
        if HAS_SKIP:
            tl.store(D_D + (b * chunks + c) * H + h, tl.sum(tl.sum(tl.where(q[:, None] == q[None, :], pairs, 0.0), 1), 0))
        d_scores += pairs * step[None, :]
        pairs *= scores
        tl.store(WITHIN + row + q, tl.sum(pairs, 0))
        pairs *= step[None, :]
        after = tl.sum(pairs.to(tl.float64), 1) - tl.sum(pairs.to(tl.float64), 0)
        left = tl.exp(total)
        if HAS_STARTS:
            left = tl.where(document == 0, left, 0.0)
        carried = tl.sum(tl.dot(query, tl.trans(state), input_precision=PRECISION) * dy.to(tl.float32), 1) * left
        d_query += tl.dot(dy, state, input_precision=PRECISION) * left[:, None]  # scaled after: rounding a scaled operand would show
        tl.store(AFTER + row + q, tl.cumsum(after + carried.to(tl.float64), 0, reverse=True).to(tl.float32))
    share = (b * chunks + c) * tl.num_programs(1) + tl.program_id(1)
    tl.store(D_SCORES + share * (Q * Q) + q[:, None] * Q + q[None, :], d_scores.to(D_SCORES.dtype.element_ty))
    d_query = tl.dot(d_scores.to(DOT), key, acc=d_query, input_precision=PRECISION)
    place = ((b * T + first) * tl.num_programs(1) + tl.program_id(1)) * N + q[:, None] * (tl.num_programs(1) * N) + n[None, :]
    tl.store(D_C + place, d_query.to(D_C.dtype.element_ty), rows_n)


@triton.jit
def key_gradients(
    X, DY, BM, CM, A, D, STEP, TOTAL, LOW, DOCUMENT, D_STATES, D_SCORES, PASSED, AFTER, WITHIN, DX, D_DT, D_A, D_B,
    parts, d_t, T, H, R, blocks, chunks, P, N, x_b, x_t, x_h, y_b, y_t, y_h, b_b, b_t, b_g, c_b, c_t, c_g,
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
        tl.store(DX + (b * T + first) * d_t + h * P + q[:, None] * d_t + p[None, :], dx.to(DX.dtype.element_ty), rows_p)
        part = tl.arange(0, PARTS)
        passed = tl.sum(tl.load(PASSED + ((b * chunks + c) * H + h) * parts + part, part < parts, other=0.0), 0)
        before = (added * step).to(tl.float64)
        # of the inputs before each step: in fp32 a large one would take their digits
        leaving = (tl.cumsum(before, 0) - before).to(tl.float32)
        d_decay = tl.load(AFTER + row + q) + leaving + passed
        tl.store(D_DT + (b * T + t) * H + h, tl.load(WITHIN + row + q) + added + d_decay * tl.load(A + h), t < T)
        tl.store(D_A + (b * chunks + c) * H + h, tl.sum(d_decay * step, 0))
    place = ((b * T + first) * tl.num_programs(1) + tl.program_id(1)) * N + q[:, None] * (tl.num_programs(1) * N) + n[None, :]
    tl.store(D_B + place, d_key.to(D_B.dtype.element_ty), rows_n)


@triton.jit
def add_shares(
    D_B, D_C, D_A, D_D, TO_B, TO_C, TO_A, TO_D, rows, N, H, G, blocks, chunks, to_t, programs,
    HAS_SKIP: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C (rows, G, N) from those of each block of heads (rows, G, blocks, N), those of A and D (H) from those of each chunk of
    each row (chunks, H), in a fixed order. Rows of TO_B and TO_C lie to_t apart."""
    if tl.program_id(0) < programs:
        row, n = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BN)
        g, inside = tl.program_id(1), (row < rows)[:, None] & (n < N)[None, :]
        d_b, d_c = tl.zeros((BR, BN), tl.float32), tl.zeros((BR, BN), tl.float32)
        for k in range(0, blocks):
            place = ((row * G + g) * blocks + k)[:, None] * N + n[None, :]
            d_b += tl.load(D_B + place, inside, other=0.0)
            d_c += tl.load(D_C + place, inside, other=0.0)
        place = row[:, None] * to_t + g * N + n[None, :]
        tl.store(TO_B + place, d_b.to(TO_B.dtype.element_ty), inside)
        tl.store(TO_C + place, d_c.to(TO_C.dtype.element_ty), inside)
    elif tl.program_id(1) == 0:
        h = (tl.program_id(0) - programs) * BH + tl.arange(0, BH)
        d_a, d_d = tl.zeros((BC, BH), tl.float32), tl.zeros((BC, BH), tl.float32)
        for first in range(0, chunks, BC):
            c = first + tl.arange(0, BC)
            inside, place = (c < chunks)[:, None] & (h < H)[None, :], c.to(tl.int64)[:, None] * H + h[None, :]
            d_a += tl.load(D_A + place, inside, other=0.0)
            if HAS_SKIP:
                d_d += tl.load(D_D + place, inside, other=0.0)
        tl.store(TO_A + h, tl.sum(d_a, 0), h < H)
        if HAS_SKIP:
            tl.store(TO_D + h, tl.sum(d_d, 0), h < H)
