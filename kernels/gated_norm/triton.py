"""Triton kernels of the gated RMSNorm; `launch.py` runs them.

A program holds whole groups of some rows in registers: one read of every input, one write of every output. The gradient of the weight is
one partial sum a program, added in a fixed order.

Legend: B batch, T time, D width, G groups, K = D / G channels of a group.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import triton
import triton.language as tl

from kernels.parts import sigmoid


@triton.jit
def forward(
    H, GATE, WEIGHT, Y, N, T, K, EPS, shb, sht, sgb, sgt,
    G: tl.constexpr, HAS_GATE: tl.constexpr, NORM_FIRST: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)[None, :]
    inside = (row < N)[:, None] & (k < K)
    b, t = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None]
    c = group * K + k
    x = tl.load(H + b * shb + t * sht + c, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        z = tl.load(GATE + b * sgb + t * sgt + c, mask=inside, other=0.0).to(tl.float32)
        act = z * sigmoid(z)
        if not NORM_FIRST:
            x *= act
    w = tl.load(WEIGHT + c, mask=k < K, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / K + EPS)[:, None] * w
    if HAS_GATE and NORM_FIRST:
        y *= act
    tl.store(Y + row.to(tl.int64)[:, None] * (G * K) + c, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    DY, H, GATE, WEIGHT, DH, DGATE, PARTIAL, N, T, K, ROWS, EPS, syb, syt, shb, sht, sgb, sgt, sdb, sdt, seb, sett,
    G: tl.constexpr, HAS_GATE: tl.constexpr, NORM_FIRST: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    k = tl.arange(0, BK)[None, :]
    c = group * K + k
    w = tl.load(WEIGHT + c, mask=k < K, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BR, BK), tl.float32)
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, N)
    for start in range(first, last, BR):
        row = start + tl.arange(0, BR)
        inside = (row < last)[:, None] & (k < K)
        b, t = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None]
        x = tl.load(H + b * shb + t * sht + c, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + b * syb + t * syt + c, mask=inside, other=0.0).to(tl.float32)
        v = x
        outer = dy
        if HAS_GATE:
            z = tl.load(GATE + b * sgb + t * sgt + c, mask=inside, other=0.0).to(tl.float32)
            s = sigmoid(z)
            if NORM_FIRST:
                outer = dy * z * s
            else:
                v = x * z * s
        dn = outer * w
        scale = tl.rsqrt(tl.sum(v * v, 1) / K + EPS)[:, None]
        mean = tl.sum(dn * v, 1)[:, None] * scale / K
        n = v * scale
        d_weight += outer * n
        dv = scale * (dn - n * mean)
        if HAS_GATE:
            slope = s * (1.0 + z * (1.0 - s))
            if NORM_FIRST:
                d_gate = dy * n * w * slope
            else:
                d_gate = dv * x * slope
                dv = dv * z * s
            tl.store(DGATE + b * seb + t * sett + c, d_gate.to(DGATE.dtype.element_ty), mask=inside)
        tl.store(DH + b * sdb + t * sdt + c, dv.to(DH.dtype.element_ty), mask=inside)
    tl.store(PARTIAL + tl.program_id(0).to(tl.int64) * (G * K) + c, tl.sum(d_weight, 0)[None, :], mask=k < K)
