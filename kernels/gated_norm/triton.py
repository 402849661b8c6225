"""Triton kernels of the gated RMSNorm, and their launches.

A program holds whole groups of some rows in registers: one read of every input, one write of every output. The gradient of the weight is
one partial sum a program, added in a fixed order.

Legend: B batch, T time, D width, G groups, K = D / G channels of a group, S states of which the last is normed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_WARP, PER_WARP_BACK = 512, 256  # channels a warp holds
PROGRAMS_BACK = 1024  # programs of the backward pass, each a run of rows and one partial sum


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


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
        act = z * _sigmoid(z)
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
    G: tl.constexpr, S: tl.constexpr, HAS_GATE: tl.constexpr, NORM_FIRST: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
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
            s = _sigmoid(z)
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
        out = DH + b * sdb + t * sdt + c
        tl.store(out, dv.to(DH.dtype.element_ty), mask=inside)
        for i in tl.static_range(1, S):  # the states that are not normed
            tl.store(out - i * (G * K), tl.zeros((BR, BK), DH.dtype.element_ty), mask=inside)
    tl.store(PARTIAL + tl.program_id(0).to(tl.int64) * (G * K) + c, tl.sum(d_weight, 0)[None, :], mask=k < K)


def rows(x: Tensor) -> Tensor:
    """x (..., D) as (B, T, D) with free strides over B and T; copied only where that cannot be."""
    x = x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tile(K: int, device: torch.device, per_warp: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program."""
    BK = triton.next_power_of_2(K)
    BR = 2 if device.type == "cpu" else max(1, 1024 // BK)
    return BR, BK, min(16, max(1, BR * BK // per_warp))


def norm(h: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, norm_first: bool, dtype: torch.dtype) -> Tensor:
    """y, contiguous, shaped as h, in `dtype`."""
    x, weight = rows(h), weight.contiguous()
    z = x if gate is None else rows(gate)
    (B, T, _), K = x.shape, x.shape[2] // groups
    BR, BK, warps = tile(K, x.device, PER_WARP)
    y = torch.empty(h.shape, dtype=dtype, device=h.device)
    forward[(triton.cdiv(B * T, BR), groups)](
        x, z, weight, y, B * T, T, K, eps, x.stride(0), x.stride(1), z.stride(0), z.stride(1),
        G=groups, HAS_GATE=gate is not None, NORM_FIRST=norm_first, BR=BR, BK=BK, num_warps=warps,
    )  # fmt: skip
    return y


def norm_backward(
    dy: Tensor, h: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, norm_first: bool,
    states: int = 1, d_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of h, gate (written into `d_gate` if given: free strides, channels neighbours) and weight.

    states > 1: h is the last of so many neighbouring rows of a contiguous (B, T, S, D), and so is its gradient; the others get zeros.
    """
    x, g, weight = rows(h), rows(dy), weight.contiguous()
    z = x if gate is None else rows(gate)
    (B, T, D), K = x.shape, x.shape[2] // groups
    BR, BK, warps = tile(K, x.device, PER_WARP_BACK)
    N = B * T
    each = triton.cdiv(triton.cdiv(N, max(1, min(PROGRAMS_BACK, triton.cdiv(N, 4 * BR)))), BR) * BR
    programs = triton.cdiv(N, each)
    dh = torch.empty(B, T, states, D, dtype=h.dtype, device=h.device)
    last = dh[:, :, -1]
    if gate is not None and d_gate is None:
        d_gate = torch.empty(z.shape, dtype=gate.dtype, device=gate.device)
    e = last if d_gate is None else d_gate
    partial = torch.empty(programs, D, dtype=torch.float32, device=h.device)
    backward[(programs, groups)](
        g, x, z, weight, last, e, partial, N, T, K, each, eps, g.stride(0), g.stride(1), x.stride(0), x.stride(1), z.stride(0), z.stride(1),
        last.stride(0), last.stride(1), e.stride(0), e.stride(1),
        G=groups, S=states, HAS_GATE=gate is not None, NORM_FIRST=norm_first, BR=BR, BK=BK, num_warps=warps,
    )  # fmt: skip
    d_h = dh if states > 1 else dh.view(h.shape)
    return d_h, None if gate is None else d_gate.reshape(gate.shape), partial.sum(0).to(weight.dtype)
