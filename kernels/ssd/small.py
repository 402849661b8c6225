"""Triton kernels of the backward pass of Mamba-2's scan for small heads and states: what `query_gradients` and `key_gradients` of gradients.py give, from
fewer registers.

Where heads and states are at most 64 wide, what a chunk of 64 steps needs lies in the registers of four warps, of which two programs fit beside each
other. What needs sums along time (gradients of dt and of A) is left to `finish`: sums from step to step inside of the large kernels have every warp
wait for the others several times a head.

Matrices of pairs of steps lie (j, i), input by output. Legend: see triton.py.
"""

from __future__ import annotations

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def query_side(
    X, DY, BM, CM, STEP, TOTAL, LOW, DOCUMENT, STATES, D_SCORES, D_C, WITHIN, ACROSS, CARRIED, SKIPPED, T, H, R, blocks, chunks,
    x_b, x_h, y_b, y_h, b_b, b_t, b_g, c_b, c_t, c_g, P: tl.constexpr, N: tl.constexpr, x_t: tl.constexpr, y_t: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What outputs ask for. Summed over the heads of this program: gradients of C and of the products C_i . B_j; and of each step (B, H, chunks Q)
    what `finish` adds up.

    With M_ji = (C_i . B_j) exp(total_i - total_j) (x_j . dy_i): WITHIN_j = sum_i M_ji; ACROSS_t is the sum of dt_j M_ji over j < t <= i, which
    outputs ask of the logarithm of step t's decay. It is added up from these pairs alone, by a product with zeros and ones: as a difference of
    sums over rows and columns it would lose the digits of small steps beside a large one. CARRIED_i = dy_i . (what the entering state gives to
    y_i); SKIPPED_j = x_j . dy_j.
    """
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    first = b * 0 + c * Q
    t = first + q
    rows_n, rows_p, inside = (t < T)[:, None] & (n < N)[None, :], (t < T)[:, None] & (p < P)[None, :], (p < P)[:, None] & (n < N)[None, :]
    query = tl.load(CM + (b * c_b + first * c_t + g * c_g) + q[:, None] * c_t + n[None, :], rows_n, other=0.0).to(DOT)
    key = tl.load(BM + (b * b_b + first * b_t + g * b_g) + q[:, None] * b_t + n[None, :], rows_n, other=0.0).to(DOT)
    allowed = q[:, None] <= q[None, :]
    until = (q[:, None] >= q[None, :]).to(DOT)  # output i, step t: t <= i
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
        gap, left = total[None, :] - total[:, None], tl.exp(total)
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[None, :] - low[:, None]
        if HAS_STARTS:
            left = tl.where(document == 0, left, 0.0)
        given = tl.dot(dy, state, input_precision=PRECISION)
        tl.store(CARRIED + row + q, tl.sum(given * query.to(tl.float32), 1) * left)
        d_query += given * left[:, None]  # scaled after: rounding a scaled operand would show
        pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISION)
        if HAS_SKIP:
            tl.store(SKIPPED + row + q, tl.sum(tl.where(q[:, None] == q[None, :], pairs, 0.0), 1))
        pairs *= tl.exp(tl.where(allowed, gap, float("-inf")))
        d_scores += pairs * step[:, None]
        pairs *= tl.dot(key, tl.trans(query), input_precision=PRECISION)
        tl.store(WITHIN + row + q, tl.sum(pairs, 1))
        pairs *= step[:, None]
        high = pairs.to(DOT)
        across = tl.dot(high, until, input_precision=PRECISION)
        if DOT != tl.float32:  # and what rounding took: the gradient of A sums these over all steps
            across = tl.dot((pairs - high.to(tl.float32)).to(DOT), until, acc=across, input_precision=PRECISION)
        tl.store(ACROSS + row + q, tl.sum(tl.where(q[:, None] < q[None, :], across, 0.0), 0))
    share = (b * chunks + c) * tl.num_programs(1) + tl.program_id(1)
    tl.store(D_SCORES + share * (Q * Q) + q[:, None] * Q + q[None, :], d_scores.to(D_SCORES.dtype.element_ty))
    d_query = tl.dot(tl.trans(d_scores).to(DOT), key, acc=d_query, input_precision=PRECISION)
    place = ((b * T + first) * tl.num_programs(1) + tl.program_id(1)) * N + q[:, None] * (tl.num_programs(1) * N) + n[None, :]
    tl.store(D_C + place, d_query.to(D_C.dtype.element_ty), rows_n)


@triton.jit
def key_side(
    X, DY, BM, CM, D, STEP, TOTAL, LOW, DOCUMENT, D_STATES, D_SCORES, DX, D_B, ADDED, T, H, R, blocks, chunks,
    x_b, x_h, y_b, y_h, b_b, b_t, b_g, c_b, c_t, c_g, P: tl.constexpr, N: tl.constexpr, x_t: tl.constexpr, y_t: tl.constexpr, d_t: tl.constexpr,
    HAS_STARTS: tl.constexpr, HAS_SKIP: tl.constexpr, FINE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What is asked of inputs: gradients of x, and of B summed over the heads of this program. ADDED_j = x_j . (what the gradient of the leaving state
    asks of it), without dt_j."""
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    g, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    q, p, n = tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    first = b * 0 + c * Q
    t = first + q
    rows_n, rows_p, inside = (t < T)[:, None] & (n < N)[None, :], (t < T)[:, None] & (p < P)[None, :], (p < P)[:, None] & (n < N)[None, :]
    query = tl.load(CM + (b * c_b + first * c_t + g * c_g) + q[:, None] * c_t + n[None, :], rows_n, other=0.0).to(DOT)
    key = tl.load(BM + (b * b_b + first * b_t + g * b_g) + q[:, None] * b_t + n[None, :], rows_n, other=0.0).to(DOT)
    share = (b * chunks + c) * tl.num_programs(1) + tl.program_id(1)
    d_scores = tl.load(D_SCORES + share * (Q * Q) + q[:, None] * Q + q[None, :])
    d_key = tl.dot(d_scores, query, input_precision=PRECISION)
    allowed = q[:, None] <= q[None, :]
    if HAS_STARTS:
        document = tl.load(DOCUMENT + b * (chunks * Q) + t)
        last = tl.load(DOCUMENT + b * (chunks * Q) + first + Q - 1)
        allowed = allowed & (document[:, None] == document[None, :])
    for k in tl.range(0, tl.minimum(HEADS, R - block * HEADS), num_stages=STAGES):
        h = g * R + block * HEADS + k
        row = (b * H + h) * (chunks * Q) + first
        x = tl.load(X + (b * x_b + first * x_t + h * x_h) + q[:, None] * x_t + p[None, :], rows_p, other=0.0).to(DOT)
        dy = tl.load(DY + (b * y_b + first * y_t + h * y_h) + q[:, None] * y_t + p[None, :], rows_p, other=0.0).to(DOT)
        d_state = tl.load(D_STATES + ((b * chunks + c) * H + h) * P * N + p[:, None] * N + n[None, :], inside, other=0.0)
        total, step, end = tl.load(TOTAL + row + q), tl.load(STEP + row + q), tl.load(TOTAL + row + Q - 1)
        gap, to_end = total[None, :] - total[:, None], end - total
        if FINE:
            low = tl.load(LOW + row + q)
            gap += low[None, :] - low[:, None]
            to_end += tl.load(LOW + row + Q - 1) - low
        right = tl.exp(to_end)
        if HAS_STARTS:
            right = tl.where(document == last, right, 0.0)
        asked = tl.dot(x, d_state, input_precision=PRECISION)
        tl.store(ADDED + row + q, tl.sum(asked * key.to(tl.float32), 1) * right)
        d_key += asked * (right * step)[:, None]
        weight = tl.dot(key, tl.trans(query), input_precision=PRECISION) * tl.exp(tl.where(allowed, gap, float("-inf")))
        dx = tl.dot(key, tl.trans(d_state), input_precision=PRECISION) * right[:, None]
        dx = tl.dot(weight.to(DOT), dy, acc=dx, input_precision=PRECISION) * step[:, None]
        if HAS_SKIP:
            dx += dy.to(tl.float32) * tl.load(D + h)
        tl.store(DX + (b * T + first) * d_t + h * P + q[:, None] * d_t + p[None, :], dx.to(DX.dtype.element_ty), rows_p)
    place = ((b * T + first) * tl.num_programs(1) + tl.program_id(1)) * N + q[:, None] * (tl.num_programs(1) * N) + n[None, :]
    tl.store(D_B + place, d_key.to(D_B.dtype.element_ty), rows_n)


@triton.jit
def finish(
    A, STEP, WITHIN, ACROSS, CARRIED, ADDED, SKIPPED, PASSED, D_DT, D_A, D_D, T, H, parts, chunks,
    HAS_SKIP: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, and of A and D per chunk. The logarithm of step t's decay acts on what outputs i >= t read of earlier steps (ACROSS) and of the
    entering state, on what inputs j < t give to the leaving state, and on what passes through the chunk."""
    b, c = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    q, h, part = tl.arange(0, Q), tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, PARTS)
    t, inside = b * 0 + c * Q + q, (h < H)[None, :]
    place, entry = (b * H + h)[None, :] * (chunks * Q) + t[:, None], (b * chunks + c) * H + h
    step, added = tl.load(STEP + place, inside, other=0.0), tl.load(ADDED + place, inside, other=0.0)
    before = (added * step).to(tl.float64)
    # of the inputs before each step: in fp32 a large one would take their digits
    leaving = (tl.cumsum(before, 0) - before).to(tl.float32)
    carried = tl.cumsum(tl.load(CARRIED + place, inside, other=0.0).to(tl.float64), 0, reverse=True).to(tl.float32)
    passed = tl.sum(tl.load(PASSED + entry[:, None] * parts + part[None, :], (h < H)[:, None] & (part < parts)[None, :], other=0.0), 1)
    d_decay = tl.load(ACROSS + place, inside, other=0.0) + carried + leaving + passed[None, :]
    d_dt = tl.load(WITHIN + place, inside, other=0.0) + added + d_decay * tl.load(A + h, h < H, other=0.0)[None, :]
    tl.store(D_DT + (b * T + t)[:, None] * H + h[None, :], d_dt, (t < T)[:, None] & inside)
    tl.store(D_A + entry, tl.sum(d_decay * step, 0), h < H)
    if HAS_SKIP:
        tl.store(D_D + entry, tl.sum(tl.load(SKIPPED + place, inside, other=0.0), 0), h < H)
