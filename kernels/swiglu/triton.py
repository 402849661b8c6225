"""Triton kernels of silu(gate) up, and their launches; imported when one is first wanted."""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.parts import sigmoid

BLOCK, WARPS = 2048, 8


@triton.jit
def forward(GATE, UP, Y, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(GATE + i, mask=i < N, other=0.0).to(tl.float32)
    u = tl.load(UP + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(Y + i, (z * sigmoid(z) * u).to(Y.dtype.element_ty), mask=i < N)


@triton.jit
def backward(DY, GATE, UP, D_GATE, D_UP, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(DY + i, mask=i < N, other=0.0).to(tl.float32)
    z = tl.load(GATE + i, mask=i < N, other=0.0).to(tl.float32)
    u = tl.load(UP + i, mask=i < N, other=0.0).to(tl.float32)
    s = sigmoid(z)
    tl.store(D_GATE + i, (d * u * s * (1.0 + z * (1.0 - s))).to(D_GATE.dtype.element_ty), mask=i < N)
    tl.store(D_UP + i, (d * z * s).to(D_UP.dtype.element_ty), mask=i < N)


def _size(N, device):
    block = 64 if device.type == "cpu" else BLOCK
    return (triton.cdiv(N, block),), block


def product(gate, up):
    """silu(gate) up, contiguous."""
    gate, up = gate.contiguous(), up.contiguous()
    y, (grid, block) = torch.empty_like(gate), _size(gate.numel(), gate.device)
    forward[grid](gate, up, y, gate.numel(), BLOCK=block, num_warps=WARPS)
    return y


def product_backward(d, gate, up):
    """Gradients of gate and up, contiguous."""
    d, gate, up = d.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up, (grid, block) = torch.empty_like(gate), torch.empty_like(up), _size(gate.numel(), gate.device)
    backward[grid](d, gate, up, d_gate, d_up, gate.numel(), BLOCK=block, num_warps=WARPS)
    return d_gate, d_up
