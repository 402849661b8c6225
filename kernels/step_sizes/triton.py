"""The Triton kernels of step sizes, and their launches; imported when they are first wanted.

Legend: B batch, T time, H heads, N = B T rows.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.parts import clamped, runs, sigmoid, softplus, summed

ELEMENTS, WARPS = 2048, 4  # of a program's tile


@triton.jit
def forward(DT, BIAS, OUT, N, T, heads, dt_b, dt_t, LEAST, MOST, BR: tl.constexpr, BH: tl.constexpr):
    n, h = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.program_id(1) * BH + tl.arange(0, BH)
    inside = (n < N)[:, None] & (h < heads)[None, :]
    x = tl.load(DT + ((n // T) * dt_b + (n % T) * dt_t)[:, None] + h[None, :], mask=inside, other=0.0).to(tl.float32)
    x += tl.load(BIAS + h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
    tl.store(OUT + n[:, None] * heads + h[None, :], clamped(softplus(x), LEAST, MOST), mask=inside)


@triton.jit
def backward(GRADIENT, DT, BIAS, D_DT, PARTIAL, N, T, heads, each, dt_b, dt_t, LEAST, MOST, BR: tl.constexpr, BH: tl.constexpr):
    """`each` rows of a run, a multiple of BR; PARTIAL (runs, heads) gets the bias's gradient."""
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    bias = tl.load(BIAS + h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BR, BH), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * each
    for first in range(0, each, BR):
        n = begin + first + tl.arange(0, BR)
        inside = (n < N)[:, None] & (h < heads)[None, :]
        place = n[:, None] * heads + h[None, :]
        x = tl.load(DT + ((n // T) * dt_b + (n % T) * dt_t)[:, None] + h[None, :], mask=inside, other=0.0).to(tl.float32) + bias
        size = softplus(x)
        d = tl.load(GRADIENT + place, mask=inside, other=0.0).to(tl.float32) * sigmoid(x)
        d = tl.where((size < LEAST) | (size > MOST), 0.0, d)
        tl.store(D_DT + place, d.to(D_DT.dtype.element_ty), mask=inside)
        total += d
    tl.store(PARTIAL + tl.program_id(0) * heads + h, tl.sum(total, 0), mask=h < heads)


def tile(H, device):
    """Rows and heads of a program."""
    heads = min(triton.next_power_of_2(max(H, 1)), 256)
    return (2 if device.type == "cpu" else max(1, ELEMENTS // heads)), heads


def _rows(dt):
    """dt with heads that are neighbours, and its strides over batch and time."""
    dt = dt if dt.stride(2) == 1 or dt.shape[2] == 1 else dt.contiguous()
    return dt, (dt.stride(0), dt.stride(1))


def step_sizes(dt, bias, low, high):
    (B, T, H), (dt, strides) = dt.shape, _rows(dt)
    out = torch.empty(B, T, H, dtype=torch.float32, device=dt.device)
    BR, BH = tile(H, dt.device)
    if out.numel():
        forward[(triton.cdiv(B * T, BR), triton.cdiv(H, BH))](
            dt, bias.contiguous(), out, B * T, T, H, *strides, low, high, BR=BR, BH=BH, num_warps=WARPS
        )
    return out


def step_sizes_backward(d, dt, bias, low, high):
    """Gradients of dt, contiguous, and bias."""
    (B, T, H), (given, strides) = dt.shape, _rows(dt)
    d_dt = torch.empty(B, T, H, dtype=dt.dtype, device=dt.device)
    if not d_dt.numel():
        return d_dt, torch.zeros_like(bias)
    BR, BH = tile(H, dt.device)
    each, programs = runs(B * T, BR)
    partial = torch.empty(programs, H, dtype=torch.float32, device=dt.device)
    backward[(programs, triton.cdiv(H, BH))](
        d.contiguous(), given, bias.contiguous(), d_dt, partial, B * T, T, H, each, *strides, low, high, BR=BR, BH=BH, num_warps=WARPS
    )
    return d_dt, summed(partial).to(bias.dtype)
