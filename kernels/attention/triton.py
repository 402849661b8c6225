"""Triton kernels of softmax attention within documents and windows; imported when one is first wanted.

A query sees the keys from the first of its document (or of its window) to its own place, so one number a token says what is seen, and a block of
queries, from the numbers of its first and last token, which blocks of keys it has to visit and which of those need no mask. Logarithms are of
base 2 (`c` is the scale times log2(e)), sums and the softmax in fp32, probabilities in the dtype of the values for their product.

Gradients take two kernels, one that owns queries and one that owns keys, so nothing is added by several programs and results repeat bit for bit.

Zero times NaN is NaN, so what is not finite in one document would reach another that shares a block with it. A query sees its own token, so
outputs show that there is such a thing: programs that meet it leave a mark, and kernels named `mend` make those heads again with the care it
takes. Otherwise they end at once.

Legend: B batch, T queries, L keys (the last T of them the queries' own), H heads, R heads that share one of keys and values, K head width; M
queries and N keys of a block.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every product of finite bf16 vectors that a softmax can tell from it, and finite


@triton.jit
def is_fine(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def first_seen(FIRST, at, place, window, inside, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """The first key that the query at `place` sees; `at`: where its row of FIRST begins."""
    first = tl.load(FIRST + at + place, mask=inside, other=0) if DOCUMENTS else place * 0
    return tl.maximum(first, place - window + 1) if WINDOW else first


@triton.jit
def last_seen(LAST, at, place, L, window, inside, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """The last query that sees the key at `place`, -1 beyond L."""
    last = tl.load(LAST + at + place, mask=inside, other=-1) if DOCUMENTS else tl.where(inside, L - 1, -1)
    return tl.minimum(last, place + window - 1) if WINDOW else last


@triton.jit
def key_blocks(FIRST, at, m, T, L, window, M: tl.constexpr, N: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr):
    """Blocks of keys that block `m` of queries sees: (the first, past the last; of those without a mask the first, and how many)."""
    begin, end = m * M + L - T, tl.minimum(m * M + M, T) - 1 + L - T  # its first and last place
    lowest = first_seen(FIRST, at, begin, window, True, DOCUMENTS, WINDOW)
    highest = first_seen(FIRST, at, end, window, True, DOCUMENTS, WINDOW)
    whole = (highest + N - 1) // N
    return lowest // N, end // N + 1, whole, tl.maximum((begin + 1) // N - whole, 0)


@triton.jit
def forward_keys(
    q, acc, top, total, lost, K, V, FIRST, at, place, first, begin, whole, full, blocks, L, skt, svt, c,
    MASK: tl.constexpr, SAFE: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Over `blocks` blocks of keys: those without a mask, or the others of those from `begin` on."""
    cols = tl.arange(0, W)
    for i in range(0, blocks):
        if MASK:
            n = begin + i
            n += tl.where(n >= whole, full, 0)
        else:
            n = whole + i
        key = tl.arange(0, N)
        K_n, V_n = K + (n * N).to(tl.int64) * skt, V + (n * N).to(tl.int64) * svt
        if MASK:
            inside = (n * N + key < L)[:, None]
            k = tl.load(K_n + key[:, None] * skt + cols[None, :], mask=inside, other=0.0)
            v = tl.load(V_n + key[:, None] * svt + cols[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(K_n + key[:, None] * skt + cols[None, :])
            v = tl.load(V_n + key[:, None] * svt + cols[None, :])
        key += n * N
        if MASK:
            seen = (key[None, :] >= first[:, None]) & (key[None, :] <= place[:, None])
        if SAFE:
            bad = tl.max((~(is_fine(k) & is_fine(v))).to(tl.int32), 1)
            lost = tl.maximum(lost, tl.max(tl.where(seen, bad[None, :], 0), 1))
            k, v = tl.where(is_fine(k), k, 0.0).to(k.dtype), tl.where(is_fine(v), v, 0.0).to(v.dtype)
        s = tl.dot(q, tl.trans(k))
        if MASK:
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s * c - (higher * c)[:, None])
        shrink = tl.exp2((top - higher) * c)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total, lost


@triton.jit
def forward_block(
    m, bh, Q, K, V, FIRST, Y, LSE, MARKS, c, T, L, H, blocks, window, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    b, h = (bh // H).to(tl.int64), bh % H
    row, cols = tl.arange(0, M), tl.arange(0, W)
    t = m * M + row
    inside = t < T
    at, place = b * L, t + L - T
    begin, end, whole, full = key_blocks(FIRST, at, m, T, L, window, M, N, DOCUMENTS, WINDOW)
    first = first_seen(FIRST, at, place, window, inside, DOCUMENTS, WINDOW)
    Q_m = Q + b * sqb + h.to(tl.int64) * sqh + (m * M).to(tl.int64) * sqt
    q = tl.load(Q_m + row[:, None] * sqt + cols[None, :], mask=inside[:, None], other=0.0)
    K, V = K + b * skb + (h // R).to(tl.int64) * skh, V + b * svb + (h // R).to(tl.int64) * svh
    acc = tl.zeros((M, W), dtype=tl.float32)
    top, total = tl.full((M,), LOWEST, dtype=tl.float32), tl.zeros((M,), dtype=tl.float32)
    lost = tl.zeros((M,), dtype=tl.int32)
    if SAFE:
        lost = tl.max((~is_fine(q)).to(tl.int32), 1)
        q = tl.where(is_fine(q), q, 0.0).to(q.dtype)
        whole, full = begin, 0
    else:
        acc, top, total, lost = forward_keys(
            q, acc, top, total, lost, K, V, FIRST, at, place, first, begin, whole, full, full, L, skt, svt, c, False, False, N, W
        )
    acc, top, total, lost = forward_keys(
        q, acc, top, total, lost, K, V, FIRST, at, place, first, begin, whole, full, end - begin - full, L, skt, svt, c, True, SAFE, N, W
    )
    total = tl.where(inside, total, 1.0)
    y = acc / total[:, None]
    lse = top * c + tl.log2(total)
    if SAFE:
        y, lse = tl.where(lost[:, None] > 0, float("nan"), y), tl.where(lost > 0, float("nan"), lse)
    else:
        tl.store(MARKS + bh.to(tl.int64) * blocks + m, tl.max(tl.max((~is_fine(y)).to(tl.int32), 1), 0))
    Y_m = Y + ((b * T + m * M) * H + h) * W
    tl.store(Y_m + (row * H * W)[:, None] + cols[None, :], y.to(Y.dtype.element_ty), mask=inside[:, None])
    tl.store(LSE + bh.to(tl.int64) * T + t, lse, mask=inside)


@triton.jit
def attention_forward(
    Q, K, V, FIRST, Y, LSE, MARKS, c, T, L, H, blocks, window, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0)
    forward_block(  # the longest begin first
        blocks - 1 - at % blocks, at // blocks, Q, K, V, FIRST, Y, LSE, MARKS, c, T, L, H, blocks, window, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
        R, M, N, W, DOCUMENTS, WINDOW, False,
    )  # fmt: skip


@triton.jit
def is_marked(MARKS, bh, blocks, SIZE: tl.constexpr):
    found = tl.zeros((SIZE,), dtype=tl.int32)
    for i in range(0, blocks, SIZE):
        n = i + tl.arange(0, SIZE)
        found |= tl.load(MARKS + bh.to(tl.int64) * blocks + n, mask=n < blocks, other=0)
    return tl.max(found, 0) > 0


@triton.jit
def attention_forward_mend(
    Q, K, V, FIRST, Y, LSE, MARKS, c, T, L, H, blocks, window, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`blocks`: those of `forward`, which left the marks."""
    bh = tl.program_id(0)
    if is_marked(MARKS, bh, blocks, 128):
        for i in range(0, (T + M - 1) // M):
            forward_block(
                tl.full((), i, tl.int32), bh, Q, K, V, FIRST, Y, LSE, MARKS, c, T, L, H, blocks, window, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
                R, M, N, W, DOCUMENTS, WINDOW, True,
            )  # fmt: skip


@triton.jit
def query_keys(
    q, d, acc, lse, delta, K, V, place, first, begin, whole, full, blocks, L, skt, svt, c,
    MASK: tl.constexpr, SAFE: tl.constexpr, N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of queries what blocks of keys give, chosen as by `forward_keys`."""
    cols = tl.arange(0, W)
    for i in range(0, blocks):
        if MASK:
            n = begin + i
            n += tl.where(n >= whole, full, 0)
        else:
            n = whole + i
        key = tl.arange(0, N)
        K_n, V_n = K + (n * N).to(tl.int64) * skt, V + (n * N).to(tl.int64) * svt
        if MASK:
            inside = (n * N + key < L)[:, None]
            k = tl.load(K_n + key[:, None] * skt + cols[None, :], mask=inside, other=0.0)
            v = tl.load(V_n + key[:, None] * svt + cols[None, :], mask=inside, other=0.0)
        else:
            k = tl.load(K_n + key[:, None] * skt + cols[None, :])
            v = tl.load(V_n + key[:, None] * svt + cols[None, :])
        if SAFE:
            k, v = tl.where(is_fine(k), k, 0.0).to(k.dtype), tl.where(is_fine(v), v, 0.0).to(v.dtype)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * c - lse[:, None])
        ds = p * (tl.dot(d, tl.trans(v)) - delta[:, None])
        if MASK:
            key += n * N
            ds = tl.where((key[None, :] >= first[:, None]) & (key[None, :] <= place[:, None]), ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc)
    return acc


@triton.jit
def query_block(
    m, bh, Q, K, V, FIRST, Y, D, LSE, DELTA, DQ, MARKS, c, scale, T, L, H, blocks, window,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    b, h = (bh // H).to(tl.int64), bh % H
    row, cols = tl.arange(0, M), tl.arange(0, W)
    t = m * M + row
    inside = t < T
    at, place = b * L, t + L - T
    begin, end, whole, full = key_blocks(FIRST, at, m, T, L, window, M, N, DOCUMENTS, WINDOW)
    first = first_seen(FIRST, at, place, window, inside, DOCUMENTS, WINDOW)
    rows = bh.to(tl.int64) * T + t
    own = ((b * T + m * M) * H + h) * W + (row * H * W)[:, None] + cols[None, :]  # in Y and DQ
    D_m = D + b * sdb + h.to(tl.int64) * sdh + (m * M).to(tl.int64) * sdt
    d = tl.load(D_m + row[:, None] * sdt + cols[None, :], mask=inside[:, None], other=0.0)
    lse = tl.load(LSE + rows, mask=inside, other=float("inf"))
    if SAFE:
        delta = tl.load(DELTA + rows, mask=inside, other=0.0)
    else:
        y = tl.load(Y + own, mask=inside[:, None], other=0.0)
        delta = tl.sum(y.to(tl.float32) * d.to(tl.float32), 1)
        tl.store(DELTA + rows, delta, mask=inside)
        tl.store(MARKS + bh.to(tl.int64) * blocks + m, tl.max((~is_fine(delta)).to(tl.int32), 0))
    Q_m = Q + b * sqb + h.to(tl.int64) * sqh + (m * M).to(tl.int64) * sqt
    q = tl.load(Q_m + row[:, None] * sqt + cols[None, :], mask=inside[:, None], other=0.0)
    K, V = K + b * skb + (h // R).to(tl.int64) * skh, V + b * svb + (h // R).to(tl.int64) * svh
    acc = tl.zeros((M, W), dtype=tl.float32)
    if SAFE:
        lost = inside & ~(is_fine(lse) & is_fine(delta))
        q, d = tl.where(is_fine(q), q, 0.0).to(q.dtype), tl.where(is_fine(d), d, 0.0).to(d.dtype)
        lse, delta = tl.where(lost, float("inf"), lse), tl.where(lost, 0.0, delta)
        whole, full = begin, 0
    else:
        acc = query_keys(q, d, acc, lse, delta, K, V, place, first, begin, whole, full, full, L, skt, svt, c, False, False, N, W)
    acc = query_keys(q, d, acc, lse, delta, K, V, place, first, begin, whole, full, end - begin - full, L, skt, svt, c, True, SAFE, N, W)
    if SAFE:
        acc = tl.where(lost[:, None], float("nan"), acc)
    tl.store(DQ + own, (acc * scale).to(DQ.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attention_query_gradients(
    Q, K, V, FIRST, Y, D, LSE, DELTA, DQ, MARKS, c, scale, T, L, H, blocks, window,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Those of queries; for the other kernels DELTA, the sum of output times gradient, and marks where that is not finite."""
    at = tl.program_id(0)
    query_block(
        blocks - 1 - at % blocks, at // blocks, Q, K, V, FIRST, Y, D, LSE, DELTA, DQ, MARKS, c, scale, T, L, H, blocks, window,
        sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt, R, M, N, W, DOCUMENTS, WINDOW, False,
    )  # fmt: skip


@triton.jit
def attention_query_mend(
    Q, K, V, FIRST, Y, D, LSE, DELTA, DQ, MARKS, c, scale, T, L, H, blocks, window,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0)
    if is_marked(MARKS, bh, blocks, 128):
        for i in range(0, (T + M - 1) // M):
            query_block(
                tl.full((), i, tl.int32), bh, Q, K, V, FIRST, Y, D, LSE, DELTA, DQ, MARKS, c, scale, T, L, H, blocks, window,
                sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt, R, M, N, W, DOCUMENTS, WINDOW, True,
            )  # fmt: skip


@triton.jit
def key_queries(
    k, v, dk, dv, Q, D, LSE, DELTA, key, last, begin, whole, full, blocks, T, L, sqt, sdt, c,
    MASK: tl.constexpr, SAFE: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of keys and values what blocks of queries give, chosen as by `forward_keys`."""
    cols = tl.arange(0, W)
    for i in range(0, blocks):
        if MASK:
            m = begin + i
            m += tl.where(m >= whole, full, 0)
        else:
            m = whole + i
        row = tl.arange(0, M)
        t = m * M + row
        Q_m, D_m = Q + (m * M).to(tl.int64) * sqt, D + (m * M).to(tl.int64) * sdt
        if MASK:
            inside = t < T
            q = tl.load(Q_m + row[:, None] * sqt + cols[None, :], mask=inside[:, None], other=0.0)
            d = tl.load(D_m + row[:, None] * sdt + cols[None, :], mask=inside[:, None], other=0.0)
            lse, delta = tl.load(LSE + t, mask=inside, other=float("inf")), tl.load(DELTA + t, mask=inside, other=0.0)
        else:
            q = tl.load(Q_m + row[:, None] * sqt + cols[None, :])
            d = tl.load(D_m + row[:, None] * sdt + cols[None, :])
            lse, delta = tl.load(LSE + t), tl.load(DELTA + t)
        if SAFE:
            lost = ~(is_fine(lse) & is_fine(delta))  # or beyond T
            q, d = tl.where(is_fine(q), q, 0.0).to(q.dtype), tl.where(is_fine(d) & ~lost[:, None], d, 0.0).to(d.dtype)
            lse, delta = tl.where(lost, float("inf"), lse), tl.where(lost, 0.0, delta)
        dp = tl.dot(v, tl.trans(d))  # before the probabilities, which then need not be kept while it is made
        p = tl.exp2(tl.dot(k, tl.trans(q)) * c - lse[None, :])
        if MASK:
            place = t + L - T
            seen = (place[None, :] >= key[:, None]) & (place[None, :] <= last[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[None, :])
        if MASK:
            ds = tl.where(seen, ds, 0.0)
        dv = tl.dot(p.to(d.dtype), d, dv)
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def key_block(
    n, bg, Q, K, V, LAST, D, LSE, DELTA, DK, DV, c, scale, T, L, H, window,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    G = H // R
    b, g = (bg // G).to(tl.int64), bg % G
    row, cols = tl.arange(0, N), tl.arange(0, W)
    key = n * N + row
    inside, at, ahead = key < L, b * L, L - T
    last = last_seen(LAST, at, key, L, window, inside, DOCUMENTS, WINDOW)
    low, high = n * N, tl.minimum(n * N + N, L) - 1
    lowest = last_seen(LAST, at, low, L, window, True, DOCUMENTS, WINDOW)
    highest = last_seen(LAST, at, high, L, window, True, DOCUMENTS, WINDOW)
    begin = tl.maximum(low - ahead, 0) // M
    end = tl.maximum(tl.minimum(highest - ahead, T - 1) + M, 0) // M
    whole = (tl.maximum(low + N - 1 - ahead, 0) + M - 1) // M
    full = tl.maximum(tl.maximum(lowest + 1 - ahead, 0) // M - whole, 0)
    K_n = K + b * skb + g.to(tl.int64) * skh + (n * N).to(tl.int64) * skt
    V_n = V + b * svb + g.to(tl.int64) * svh + (n * N).to(tl.int64) * svt
    k = tl.load(K_n + row[:, None] * skt + cols[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(V_n + row[:, None] * svt + cols[None, :], mask=inside[:, None], other=0.0)
    if SAFE:
        k, v = tl.where(is_fine(k), k, 0.0).to(k.dtype), tl.where(is_fine(v), v, 0.0).to(v.dtype)
    dk, dv = tl.zeros((N, W), dtype=tl.float32), tl.zeros((N, W), dtype=tl.float32)
    if SAFE:
        whole, full = begin, 0
    for r in range(0, R):
        h = (g * R + r).to(tl.int64)
        Q_h, D_h, rows = Q + b * sqb + h * sqh, D + b * sdb + h * sdh, (b * H + h) * T
        if not SAFE:
            dk, dv = key_queries(
                k, v, dk, dv, Q_h, D_h, LSE + rows, DELTA + rows, key, last, begin, whole, full, full, T, L, sqt, sdt, c, False, False, M, W
            )
        masked = tl.maximum(end - begin - full, 0)
        dk, dv = key_queries(
            k, v, dk, dv, Q_h, D_h, LSE + rows, DELTA + rows, key, last, begin, whole, full, masked, T, L, sqt, sdt, c, True, SAFE, M, W
        )
    own = ((b * L + n * N) * G + g) * W + (row * G * W)[:, None] + cols[None, :]
    tl.store(DK + own, (dk * scale).to(DK.dtype.element_ty), mask=inside[:, None])
    tl.store(DV + own, dv.to(DV.dtype.element_ty), mask=inside[:, None])


@triton.jit
def attention_key_gradients(
    Q, K, V, LAST, D, LSE, DELTA, DK, DV, c, scale, T, L, H, window,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Those of keys and values. The first blocks of keys are seen by most queries and begin first."""
    at, blocks = tl.program_id(0), (L + N - 1) // N
    key_block(
        at % blocks, at // blocks, Q, K, V, LAST, D, LSE, DELTA, DK, DV, c, scale, T, L, H, window,
        sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt, R, M, N, W, DOCUMENTS, WINDOW, False,
    )  # fmt: skip


@triton.jit
def attention_key_mend(
    Q, K, V, LAST, D, LSE, DELTA, DK, DV, MARKS, c, scale, T, L, H, blocks, window,
    sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt,
    R: tl.constexpr, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    bg = tl.program_id(0)
    if is_marked(MARKS, bg, blocks * R, 128):  # those of its R heads lie behind each other
        for i in range(0, (L + N - 1) // N):
            key_block(
                tl.full((), i, tl.int32), bg, Q, K, V, LAST, D, LSE, DELTA, DK, DV, c, scale, T, L, H, window,
                sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, sdb, sdh, sdt, R, M, N, W, DOCUMENTS, WINDOW, True,
            )  # fmt: skip
