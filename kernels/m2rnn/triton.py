"""Triton kernels of M2RNN: walks in order over blocks of rows of a head's state, which share a weight and nothing else.

A program owns BK rows of one head. Its state lies in fp32 in registers, the head's weight beside it; a step multiplies the one with the other,
adds the outer product of that step's key and value, and forgets by the gate. What the next step reads is loaded before this step's product.

    walk     all steps: outputs, and the states at the borders of chunks
    states   some chunks again, each from its border, for the state that each step enters with, and HAS_TANHS: what its tanh gives
    back     those chunks backwards: gradients of all inputs; the adjoint and the sum of the weight's gradient are carried in memory

Legend: b batch row, h head, i block of rows, t step; T steps, H heads, K rows and V columns of a state, R heads that share a query and a key.
"""

# Arguments of kernels are pointers and numbers of Triton's own kinds.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:  # within 2^-11, relatively
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        size = tl.abs(x)
        e = tl.exp(-2.0 * size)
        s = x * x
        small = size * (1.0 + s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869489))))
        top = tl.where(size < 0.2, small, (1.0 - e) / (1.0 + e))
        return tl.where(x < 0.0, -top, top)


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
    return _tanh(tl.dot(entering, w, input_precision=PRECISION) + x[:, None] * y[None, :], FAST)


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
    step = b * T * H + h
    o_ = O + ((i * B + b) * T * H + h) * V + v
    border = BORDERS + bh * chunks * K * V + tile
    q = tl.load(q_, mask=here, other=0.0).to(tl.float32)
    x = tl.load(x_, mask=here, other=0.0).to(tl.float32)
    y = tl.load(y_, mask=there, other=0.0).to(tl.float32)
    keep, write = tl.load(KEEP + step), tl.load(WRITE + step)
    if HAS_STARTS:
        new = tl.load(STARTS + b * T)
    for t in range(0, T):
        more = t + 1 < T
        q_ += q_t
        x_ += k_t
        y_ += v_t
        step += H
        q_next = tl.load(q_, mask=k < tl.where(more, K, 0), other=0.0)
        x_next = tl.load(x_, mask=k < tl.where(more, K, 0), other=0.0)
        y_next = tl.load(y_, mask=v < tl.where(more, V, 0), other=0.0)
        keep_next, write_next = tl.load(KEEP + step, mask=more, other=0.0), tl.load(WRITE + step, mask=more, other=0.0)
        if HAS_BORDERS:
            if t % CHUNK == 0:
                tl.store(border, state, mask=inside)
                border += K * V
        if HAS_STARTS:
            state = tl.where(new != 0, 0.0, state)
            new = tl.load(STARTS + b * T + t + 1, mask=more, other=0)
        state = keep * state + write * _content(state.to(DOT), w, x, y, PRECISION, FAST)
        tl.store(o_, tl.sum(q[:, None] * state, 0).to(O.dtype.element_ty), mask=there)
        o_ += H * V
        q, x, y = q_next.to(tl.float32), x_next.to(tl.float32), y_next.to(tl.float32)
        keep, write = keep_next, write_next
    tl.store(FINAL + bh * K * V + tile, state, mask=inside)


@triton.jit
def states(
    X, Y, KEEP, WRITE, STARTS, W, BORDERS, STATES, TANHS, first, T, H, K, V, R, blocks, chunks, k_b, k_t, k_h, v_b, v_t, v_h,
    HAS_STARTS: tl.constexpr, HAS_TANHS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    b, h, i, bh = _place(H, blocks)
    k, v = i * BK + tl.arange(0, BK), tl.arange(0, BV)
    here, there = k < K, v < V
    w = _weight(W, h, v, BV)
    chunk = first + tl.program_id(1)
    begin = (chunk * CHUNK).to(tl.int64)
    steps = tl.minimum(CHUNK, T - chunk * CHUNK)
    state = tl.load(BORDERS + (bh * chunks + chunk) * K * V + k[:, None] * V + v[None, :], mask=here[:, None] & there[None, :], other=0.0)
    place = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * CHUNK
    at = place * (BK * BV) + tl.arange(0, BK)[:, None] * BV + v[None, :]
    s_, z_ = STATES + at, TANHS + at
    x_, y_ = X + b * k_b + begin * k_t + (h // R) * k_h + k, Y + b * v_b + begin * v_t + h * v_h + v
    step = (b * T + begin) * H + h
    x = tl.load(x_, mask=here, other=0.0).to(tl.float32)
    y = tl.load(y_, mask=there, other=0.0).to(tl.float32)
    keep, write = tl.load(KEEP + step), tl.load(WRITE + step)
    if HAS_STARTS:
        new = tl.load(STARTS + b * T + begin)
    for t in range(0, steps):
        more = t + 1 < steps
        x_ += k_t
        y_ += v_t
        step += H
        x_next = tl.load(x_, mask=k < tl.where(more, K, 0), other=0.0)
        y_next = tl.load(y_, mask=v < tl.where(more, V, 0), other=0.0)
        keep_next, write_next = tl.load(KEEP + step, mask=more, other=0.0), tl.load(WRITE + step, mask=more, other=0.0)
        if HAS_STARTS:
            state = tl.where(new != 0, 0.0, state)
            new = tl.load(STARTS + b * T + begin + t + 1, mask=more, other=0)
        entering = state.to(DOT)
        tl.store(s_, entering)
        s_ += BK * BV
        z = _content(entering, w, x, y, PRECISION, FAST)
        if HAS_TANHS:
            tl.store(z_, z.to(TANHS.dtype.element_ty))
            z_ += BK * BV
        state = keep * state + write * z
        x, y, keep, write = x_next.to(tl.float32), y_next.to(tl.float32), keep_next, write_next


@triton.jit
def back(
    Q, X, Y, KEEP, WRITE, STARTS, W, STATES, TANHS, DO, DQ, DX, DY, DG, DW, ADJOINT, begin, end, longest, B, T, H, K, V, R, blocks,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    HAS_STARTS: tl.constexpr, HAS_TANHS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    b, h, i, bh = _place(H, blocks)
    k, v = i * BK + tl.arange(0, BK), tl.arange(0, BV)
    here, there = k < K, v < V
    w = _weight(W, h, v, BV)
    adjoint_ = ADJOINT + bh * K * V + k[:, None] * V + v[None, :]
    a = tl.load(adjoint_, mask=here[:, None] & there[None, :], other=0.0)
    dw_ = DW + tl.program_id(0).to(tl.int64) * (BV * BV) + v[:, None] * BV + v[None, :]
    dw = tl.load(dw_)
    t = (end - 1).to(tl.int64)
    q_, x_ = Q + b * q_b + t * q_t + (h // R) * q_h + k, X + b * k_b + t * k_t + (h // R) * k_h + k
    y_, row = Y + b * v_b + t * v_t + h * v_h + v, (b * T + t) * H + h
    part = i.to(tl.int64) * B * T * H + row
    do_, dy_, dg_ = DO + row * V + v, DY + part * V + v, DG + part
    dq_, dx_ = DQ + row * K + k, DX + row * K + k
    at = (tl.program_id(0).to(tl.int64) * longest + (end - 1 - begin)) * (BK * BV) + tl.arange(0, BK)[:, None] * BV + v[None, :]
    s_, z_ = STATES + at, TANHS + at
    q = tl.load(q_, mask=here, other=0.0).to(tl.float32)
    x = tl.load(x_, mask=here, other=0.0).to(tl.float32)
    y = tl.load(y_, mask=there, other=0.0).to(tl.float32)
    do = tl.load(do_, mask=there, other=0.0).to(tl.float32)
    keep, write, before = tl.load(KEEP + row), tl.load(WRITE + row), tl.load(s_)
    if HAS_TANHS:
        z = tl.load(z_).to(tl.float32)
    if HAS_STARTS:
        new = tl.load(STARTS + b * T + t)
    for n in range(0, end - begin):
        more = n + 1 < end - begin
        q_ -= q_t
        x_ -= k_t
        y_ -= v_t
        row -= H
        do_ -= H * V
        s_ -= BK * BV
        q_next = tl.load(q_, mask=k < tl.where(more, K, 0), other=0.0)
        x_next = tl.load(x_, mask=k < tl.where(more, K, 0), other=0.0)
        y_next = tl.load(y_, mask=v < tl.where(more, V, 0), other=0.0)
        do_next = tl.load(do_, mask=v < tl.where(more, V, 0), other=0.0)
        keep_next, write_next = tl.load(KEEP + row, mask=more, other=0.0), tl.load(WRITE + row, mask=more, other=0.0)
        before_next = tl.load(s_, mask=(v < tl.where(more, BV, 0))[None, :], other=0.0)
        if HAS_TANHS:
            z_ -= BK * BV
            z_next = tl.load(z_, mask=(v < tl.where(more, BV, 0))[None, :], other=0.0)
        else:
            z = _content(before, w, x, y, PRECISION, FAST)
        h_before = before.to(tl.float32)
        a += q[:, None] * do[None, :]
        dp = write * (1.0 - z * z) * a
        dp_ = dp.to(DOT)
        through = tl.dot(dp_, tl.trans(w), input_precision=PRECISION)
        dw = tl.dot(tl.trans(before), dp_, dw, input_precision=PRECISION)
        tl.store(dq_, tl.sum((keep * h_before + write * z) * do[None, :], 1).to(DQ.dtype.element_ty), mask=here)
        tl.store(dx_, tl.sum(dp * y[None, :], 1).to(DX.dtype.element_ty), mask=here)
        tl.store(dy_, tl.sum(dp * x[:, None], 0).to(DY.dtype.element_ty), mask=there)
        tl.store(dg_, keep * tl.sum(tl.sum(a * (h_before - z), 1), 0))
        a = keep * a + through
        if HAS_STARTS:
            a = tl.where(new != 0, 0.0, a)
            new = tl.load(STARTS + b * T + t - n - 1, mask=more, other=0)
        dq_ -= H * K
        dx_ -= H * K
        dy_ -= H * V
        dg_ -= H
        q, x, y, do = q_next.to(tl.float32), x_next.to(tl.float32), y_next.to(tl.float32), do_next.to(tl.float32)
        keep, write, before = keep_next, write_next, before_next
        if HAS_TANHS:
            z = z_next.to(tl.float32)
    tl.store(adjoint_, a, mask=here[:, None] & there[None, :])
    tl.store(dw_, dw)
