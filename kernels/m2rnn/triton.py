"""Triton kernels of M2RNN: walks in order over blocks of rows of a head's state, which share a weight and nothing else.

A program owns BK rows of one head. Its state lies in fp32 in registers, the head's weight beside it; a step multiplies the one with the other,
adds the outer product of that step's key and value, and forgets by the gate.

    walk       all steps: outputs, and the states at the borders of chunks
    slopes     chunks again, side by side, each from its border: 1 - tanh^2 of each step
    adjoint    steps backwards, one after another, with one product each: the adjoint of each step's state
    gradients  chunks again from their borders, side by side, with the adjoints at hand: gradients of all inputs, and of the weight a sum for a chunk

Legend: b batch row, h head, i block of rows, t step; T steps, H heads, K rows and V columns of a state, R heads that share a query and a key.
SLOPES and ADJOINTS are (B H, steps of some chunks, ROWS, BV).
"""

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def exact_tanh(x):
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    s = x * x
    small = size * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869489))))
    top = tl.where(size < 0.2, small, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -top, top)


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:  # within 2^-11, relatively
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return exact_tanh(x)


@triton.jit
def _place(H, blocks):
    """Batch row, head, block of this program, and the number of the first two together."""
    number = tl.program_id(0)
    bh = number // blocks
    return (bh // H).to(tl.int64), bh % H, number % blocks, bh.to(tl.int64)


@triton.jit
def _weight(W, h, v, BV: tl.constexpr):
    return tl.load(W + h.to(tl.int64) * (BV * BV) + v[:, None] * BV + v[None, :])  # in the dtype of products, filled up with zeros


@triton.jit
def _content(entering, w, x, y, PRECISION: tl.constexpr, FAST: tl.constexpr):
    return _tanh(tl.dot(entering, w, x[:, None] * y[None, :], input_precision=PRECISION), FAST)


@triton.jit
def _plus(a, b, c, d, e, f):
    return a + d, b + e, c + f


# What a step reads is loaded four steps before, right after its place was read last. Loops are unrolled by eight, so that it is moved from one register
# to another only then, and after the last step that step is read again, so that nothing is selected: either waits for the load.


@triton.jit
def _vector(at, t, stride, T, n, size):
    """Step t, or the last, of what has `size` numbers a step."""
    return tl.load(at + tl.cast(tl.minimum(t, T - 1), tl.int64) * stride, mask=n < size, other=0.0)


@triton.jit
def _vectors(at, stride, T, n, size):
    """The first four steps."""
    one, two = _vector(at, 0, stride, T, n, size), _vector(at, 1, stride, T, n, size)
    return one, two, _vector(at, 2, stride, T, n, size), _vector(at, 3, stride, T, n, size)


@triton.jit
def _number(at, t, stride, T):
    return tl.load(at + tl.cast(tl.minimum(t, T - 1), tl.int64) * stride)


@triton.jit
def _numbers(at, stride, T):
    return _number(at, 0, stride, T), _number(at, 1, stride, T), _number(at, 2, stride, T), _number(at, 3, stride, T)


@triton.jit
def _chunk(BORDERS, bh, first, chunks, T, k, K, v, V, CHUNK: tl.constexpr):
    """First step and number of steps of the chunk that is this program's, and the state before it."""
    chunk = first + tl.program_id(1)
    state = tl.load(
        BORDERS + (bh * chunks + chunk) * K * V + k[:, None] * V + v[None, :], mask=(k < K)[:, None] & (v < V)[None, :], other=0.0
    )
    return (chunk * CHUNK).to(tl.int64), tl.minimum(CHUNK, T - chunk * CHUNK), state


@triton.jit
def _read(x_, y_, keep_, write_, start_, t, steps, k_t, v_t, H, k, K, v, V, HAS_STARTS: tl.constexpr):
    """What a step of a chunk that is walked again reads: key, value, both shares of the gate, whether a document starts."""
    new = _number(start_, t, 1, steps) if HAS_STARTS else 0
    return (
        _vector(x_, t, k_t, steps, k, K),
        _vector(y_, t, v_t, steps, v, V),
        _number(keep_, t, H, steps),
        _number(write_, t, H, steps),
        new,
    )


@triton.jit
def walk(
    Q, X, Y, KEEP, WRITE, STARTS, W, H0, O, FINAL, BORDERS, B, T, H, K, V, R, blocks, chunks, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    HAS_H0: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_BORDERS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FAST: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h, i, bh = _place(H, blocks)
    k, v = i * BK + tl.arange(0, BK), tl.arange(0, BV)
    here, there = k < K, v < V
    tile, inside = k[:, None] * V + v[None, :], here[:, None] & there[None, :]
    w = _weight(W, h, v, BV)
    state = tl.zeros((BK, BV), tl.float32)
    if HAS_H0:
        state = tl.load(H0 + bh * K * V + tile, mask=inside, other=0.0)
    q_, x_, y_ = Q + b * q_b + (h // R) * q_h + k, X + b * k_b + (h // R) * k_h + k, Y + b * v_b + h * v_h + v
    keep_, write_, start_ = KEEP + b * T * H + h, WRITE + b * T * H + h, STARTS + b * T
    o_ = O + ((i * B + b) * T * H + h) * V + v
    border = BORDERS + bh * chunks * K * V + tile
    q0, q1, q2, q3 = _vectors(q_, q_t, T, k, K)
    x0, x1, x2, x3 = _vectors(x_, k_t, T, k, K)
    y0, y1, y2, y3 = _vectors(y_, v_t, T, v, V)
    keep0, keep1, keep2, keep3 = _numbers(keep_, H, T)
    write0, write1, write2, write3 = _numbers(write_, H, T)
    new0, new1, new2, new3 = _numbers(start_, 1, T) if HAS_STARTS else (0, 0, 0, 0)
    for t in tl.range(0, T, loop_unroll_factor=8):
        if HAS_BORDERS:
            if t % CHUNK == 0:
                tl.store(border, state, mask=inside)
                border += K * V
        if HAS_STARTS:
            state = tl.where(new0 != 0, 0.0, state)
        state = keep0 * state + write0 * _content(state.to(DOT), w, x0.to(tl.float32), y0.to(tl.float32), PRECISION, FAST)
        tl.store(o_, tl.sum(q0.to(tl.float32)[:, None] * state, 0).to(O.dtype.element_ty), mask=there)
        o_ += H * V
        q0, q1, q2, q3 = q1, q2, q3, _vector(q_, t + 4, q_t, T, k, K)
        x0, x1, x2, x3 = x1, x2, x3, _vector(x_, t + 4, k_t, T, k, K)
        y0, y1, y2, y3 = y1, y2, y3, _vector(y_, t + 4, v_t, T, v, V)
        keep0, keep1, keep2, keep3 = keep1, keep2, keep3, _number(keep_, t + 4, H, T)
        write0, write1, write2, write3 = write1, write2, write3, _number(write_, t + 4, H, T)
        if HAS_STARTS:
            new0, new1, new2, new3 = new1, new2, new3, _number(start_, t + 4, 1, T)
    tl.store(FINAL + bh * K * V + tile, state, mask=inside)


@triton.jit
def slopes(
    X, Y, KEEP, WRITE, STARTS, W, BORDERS, SLOPES, first, T, H, K, V, R, blocks, chunks, k_b, k_t, k_h, v_b, v_t, v_h,
    HAS_STARTS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h, i, bh = _place(H, blocks)
    k, v = i * BK + tl.arange(0, BK), tl.arange(0, BV)
    w = _weight(W, h, v, BV)
    begin, steps, state = _chunk(BORDERS, bh, first, chunks, T, k, K, v, V, CHUNK)
    s_ = SLOPES + (bh * tl.num_programs(1) + tl.program_id(1)) * CHUNK * ROWS * BV + k[:, None] * BV + v[None, :]
    x_, y_ = X + b * k_b + begin * k_t + (h // R) * k_h + k, Y + b * v_b + begin * v_t + h * v_h + v
    step = (b * T + begin) * H + h
    keep_, write_, start_ = KEEP + step, WRITE + step, STARTS + b * T + begin
    x, y, keep, write, new = _read(x_, y_, keep_, write_, start_, 0, steps, k_t, v_t, H, k, K, v, V, HAS_STARTS)
    for t in range(0, steps):
        x_next, y_next, keep_next, write_next, new_next = _read(
            x_, y_, keep_, write_, start_, t + 1, steps, k_t, v_t, H, k, K, v, V, HAS_STARTS
        )
        if HAS_STARTS:
            state = tl.where(new != 0, 0.0, state)
        z = _content(state.to(DOT), w, x.to(tl.float32), y.to(tl.float32), PRECISION, FAST)
        tl.store(s_, (1.0 - z * z).to(SLOPES.dtype.element_ty))
        s_ += ROWS * BV
        state = keep * state + write * z
        x, y, keep, write, new = x_next, y_next, keep_next, write_next, new_next


@triton.jit
def adjoint(
    Q, KEEP, WRITE, STARTS, W, SLOPES, DO, ADJOINTS, ADJOINT, begin, end, longest, B, T, H, K, V, R, blocks, q_b, q_t, q_h,
    HAS_STARTS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h, i, bh = _place(H, blocks)
    k, v = i * BK + tl.arange(0, BK), tl.arange(0, BV)
    here, there = k < K, v < V
    w = tl.load(W + h.to(tl.int64) * (BV * BV) + v[None, :] * BV + v[:, None])  # transposed
    adjoint_ = ADJOINT + bh * K * V + k[:, None] * V + v[None, :]
    a = tl.load(adjoint_, mask=here[:, None] & there[None, :], other=0.0)
    t, steps = tl.cast(end - 1, tl.int64), end - begin  # n counts back from t
    q_, row, start_ = Q + b * q_b + t * q_t + (h // R) * q_h + k, (b * T + t) * H + h, STARTS + b * T + t
    do_, keep_, write_ = DO + row * V + v, KEEP + row, WRITE + row
    at = (bh * longest + steps - 1) * ROWS * BV + k[:, None] * BV + v[None, :]
    s_, a_ = SLOPES + at, ADJOINTS + at
    q0, q1, q2, q3 = _vectors(q_, -q_t, steps, k, K)
    do0, do1, do2, do3 = _vectors(do_, -H * V, steps, v, V)
    s0, s1, s2, s3 = _numbers(s_, -ROWS * BV, steps)
    keep0, keep1, keep2, keep3 = _numbers(keep_, -H, steps)
    write0, write1, write2, write3 = _numbers(write_, -H, steps)
    new0, new1, new2, new3 = _numbers(start_, -1, steps) if HAS_STARTS else (0, 0, 0, 0)
    for n in tl.range(0, steps, loop_unroll_factor=8):
        a += q0.to(tl.float32)[:, None] * do0.to(tl.float32)[None, :]
        tl.store(a_, a.to(ADJOINTS.dtype.element_ty))
        a_ -= ROWS * BV
        dp = s0.to(tl.float32) * (write0 * a)
        a = tl.dot(dp.to(DOT), w, keep0 * a, input_precision=PRECISION)
        if HAS_STARTS:
            a = tl.where(new0 != 0, 0.0, a)
            new0, new1, new2, new3 = new1, new2, new3, _number(start_, n + 4, -1, steps)
        q0, q1, q2, q3 = q1, q2, q3, _vector(q_, n + 4, -q_t, steps, k, K)
        do0, do1, do2, do3 = do1, do2, do3, _vector(do_, n + 4, -H * V, steps, v, V)
        s0, s1, s2, s3 = s1, s2, s3, _number(s_, n + 4, -ROWS * BV, steps)
        keep0, keep1, keep2, keep3 = keep1, keep2, keep3, _number(keep_, n + 4, -H, steps)
        write0, write1, write2, write3 = write1, write2, write3, _number(write_, n + 4, -H, steps)
    tl.store(adjoint_, a, mask=here[:, None] & there[None, :])


@triton.jit
def gradients(
    X, Y, KEEP, WRITE, STARTS, W, BORDERS, ADJOINTS, DO, DQ, DX, DY, DG, DW, first, B, T, H, K, V, R, blocks, chunks,
    k_b, k_t, k_h, v_b, v_t, v_h,
    HAS_STARTS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h, i, bh = _place(H, blocks)
    k, v = i * BK + tl.arange(0, BK), tl.arange(0, BV)
    here, there = k < K, v < V
    w = _weight(W, h, v, BV)
    begin, steps, state = _chunk(BORDERS, bh, first, chunks, T, k, K, v, V, CHUNK)
    a_ = ADJOINTS + (bh * tl.num_programs(1) + tl.program_id(1)) * CHUNK * ROWS * BV + k[:, None] * BV + v[None, :]
    dw_ = DW + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BV * BV) + v[:, None] * BV + v[None, :]
    dw = tl.load(dw_)
    x_, y_ = X + b * k_b + begin * k_t + (h // R) * k_h + k, Y + b * v_b + begin * v_t + h * v_h + v
    row = (b * T + begin) * H + h
    part = i.to(tl.int64) * B * T * H + row
    do_, dy_, dg_ = DO + row * V + v, DY + part * V + v, DG + row * K + k
    dq_, dx_ = DQ + row * K + k, DX + row * K + k
    keep_, write_, start_ = KEEP + row, WRITE + row, STARTS + b * T + begin
    x, y, keep, write, new = _read(x_, y_, keep_, write_, start_, 0, steps, k_t, v_t, H, k, K, v, V, HAS_STARTS)
    do, a = _vector(do_, 0, H * V, steps, v, V), _number(a_, 0, ROWS * BV, steps)
    for t in range(0, steps):
        x_next, y_next, keep_next, write_next, new_next = _read(
            x_, y_, keep_, write_, start_, t + 1, steps, k_t, v_t, H, k, K, v, V, HAS_STARTS
        )
        do_next, a_next = _vector(do_, t + 1, H * V, steps, v, V), _number(a_, t + 1, ROWS * BV, steps)
        if HAS_STARTS:
            state = tl.where(new != 0, 0.0, state)
        x, y, do, a = x.to(tl.float32), y.to(tl.float32), do.to(tl.float32), a.to(tl.float32)
        entering = state.to(DOT)
        z = _content(entering, w, x, y, PRECISION, FAST)
        dp = write * (1.0 - z * z) * a
        dw = tl.dot(tl.trans(entering), dp.to(DOT), dw, input_precision=PRECISION)
        change = a * (state - z)
        state = keep * state + write * z
        of_gate, of_q, of_x = tl.reduce((change, state * do[None, :], dp * y[None, :]), 1, _plus)  # of rows, in one exchange between warps
        tl.store(dg_, keep * of_gate, mask=here)
        tl.store(dq_, of_q.to(DQ.dtype.element_ty), mask=here)
        tl.store(dx_, of_x.to(DX.dtype.element_ty), mask=here)
        tl.store(dy_, tl.sum(dp * x[:, None], 0).to(DY.dtype.element_ty), mask=there)
        dq_ += H * K
        dx_ += H * K
        dy_ += H * V
        dg_ += H * K
        x, y, do, a, keep, write, new = x_next, y_next, do_next, a_next, keep_next, write_next, new_next
    tl.store(dw_, dw)
