"""Triton kernels of silu(gate) up, and their launches; imported when one is first wanted.

gate and up may be columns of one tensor, as one product makes them both; their gradients then are columns of one tensor too.

Legend: M rows, F width.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.parts import sigmoid

BLOCK, WARPS = 2048, 8


@triton.jit
def forward(GATE, UP, Y, N, F, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = i // F * stride + i % F
    z = tl.load(GATE + j, mask=i < N, other=0.0).to(tl.float32)
    u = tl.load(UP + j, mask=i < N, other=0.0).to(tl.float32)
    tl.store(Y + i, (z * sigmoid(z) * u).to(Y.dtype.element_ty), mask=i < N)


@triton.jit
def backward(DY, GATE, UP, D_GATE, D_UP, N, F, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j = i // F * stride + i % F
    d = tl.load(DY + i, mask=i < N, other=0.0).to(tl.float32)
    z = tl.load(GATE + j, mask=i < N, other=0.0).to(tl.float32)
    u = tl.load(UP + j, mask=i < N, other=0.0).to(tl.float32)
    s = sigmoid(z)
    tl.store(D_GATE + j, (d * u * s * (1.0 + z * (1.0 - s))).to(D_GATE.dtype.element_ty), mask=i < N)
    tl.store(D_UP + j, (d * z * s).to(D_UP.dtype.element_ty), mask=i < N)


def _size(N, device):
    block = 64 if device.type == "cpu" else BLOCK
    return (triton.cdiv(N, block),), block


def _rows(gate, up):
    """gate and up with rows M of one stride, and whether they are the halves of one tensor (..., 2 F)."""
    F, ROW = gate.shape[-1], 2 * gate.shape[-1]
    halves = gate.stride() == up.stride() and up.data_ptr() == gate.data_ptr() + F * gate.element_size()
    strides = [ROW]
    for n in reversed(gate.shape[1:-1]):
        strides.insert(0, strides[0] * n)
    if halves and gate.ndim > 1 and gate.stride(-1) == 1 and list(gate.stride()[:-1]) == strides:
        return gate, up, ROW, True
    return gate.contiguous(), up.contiguous(), F, False


def product(gate, up):
    """silu(gate) up, contiguous."""
    gate, up, row, _ = _rows(gate, up)
    y, (grid, block) = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), _size(gate.numel(), gate.device)
    forward[grid](gate, up, y, gate.numel(), gate.shape[-1], row, BLOCK=block, num_warps=WARPS)
    return y


def product_backward(d, gate, up):
    """Gradients of gate and up: contiguous, or the halves of one tensor where gate and up are."""
    d, (gate, up, row, halves) = d.contiguous(), _rows(gate, up)
    if halves:
        d_gate, d_up = torch.empty(*gate.shape[:-1], row, dtype=gate.dtype, device=gate.device).chunk(2, -1)
    else:
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    grid, block = _size(gate.numel(), gate.device)
    backward[grid](d, gate, up, d_gate, d_up, gate.numel(), gate.shape[-1], row, BLOCK=block, num_warps=WARPS)
    return d_gate, d_up
