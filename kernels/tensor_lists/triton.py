"""Triton kernels over lists of tensors, and their launches; imported when one is first wanted.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import functools

import torch
import triton
import triton.language as tl

CHUNK, BLOCK, WARPS = 65536, 4096, 8  # elements of a partial sum, and of a turn of its program


@triton.jit
def total_squares(ADDRESSES, SIZES, TENSOR, PLACE, OUT, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """OUT[b] = the sum of squares of chunk PLACE[b] of tensor TENSOR[b]."""
    b = tl.program_id(0)
    t = tl.load(TENSOR + b)
    x = tl.load(ADDRESSES + t).to(tl.pointer_type(tl.float32))
    first = tl.load(PLACE + b).to(tl.int64) * CHUNK
    left = tl.load(SIZES + t) - first
    total = tl.zeros((BLOCK,), tl.float32)
    if left >= CHUNK:  # without a mask, which would keep loads from being wide
        for i in range(0, CHUNK, BLOCK):
            v = tl.load(tl.multiple_of(x + first + i + tl.arange(0, BLOCK), 16))
            total += v * v
    else:
        for i in range(0, CHUNK, BLOCK):
            c = i + tl.arange(0, BLOCK)
            v = tl.load(x + first + c, mask=c < left, other=0.0)
            total += v * v
    tl.store(OUT + b, tl.sum(total, 0))


@triton.jit
def place(e, EACH, C, SIDE: tl.constexpr):
    """Where element e of an (r, c) lies when the SIDE matrices in it are one behind the other."""
    if SIDE == 1:
        return e
    else:
        row, column, width = e // C, e % C, C // SIDE
        return column // width * (EACH // SIDE) + row * width + column % width


@triton.jit
def muon_momentum(
    ADDRESSES, M, X, DIVISOR, BETA, EACH, C, SIDE: tl.constexpr, NESTEROV: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr
):
    k = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < EACH
    base = k.to(tl.int64) * EACH
    address = tl.load(ADDRESSES + k).to(tl.pointer_type(tl.float32))
    g = tl.load(tl.multiple_of(address + e, 16), mask=inside, other=0.0)
    if DIVIDE:
        g = g / tl.load(DIVISOR)
    m = tl.load(M + base + e, mask=inside, other=0.0)
    m += (1.0 - BETA) * (g - m)
    tl.store(M + base + e, m, mask=inside)
    x = m
    if NESTEROV:
        x = g + BETA * (m - g)
    tl.store(X + base + place(e, EACH, C, SIDE), x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def muon_step(ADDRESSES, U, KEEP, STEP, EACH, C, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < EACH
    u = tl.load(U + k.to(tl.int64) * EACH + place(e, EACH, C, SIDE), mask=inside, other=0.0).to(tl.float32)
    w = tl.multiple_of(tl.load(ADDRESSES + k).to(tl.pointer_type(tl.float32)) + e, 16)
    tl.store(w, KEEP * tl.load(w, mask=inside, other=0.0) - STEP * u, mask=inside)


@functools.lru_cache(maxsize=64)
def addresses(numbers, device):
    """(n,) int64 on `device`; the same ones are sent once, as under CUDA graphs, whose tensors stay where they are."""
    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=8)
def chunks(sizes, device):
    """(sizes, the tensor and the place in it of each chunk)."""
    tensor = [i for i, n in enumerate(sizes) for _ in range(triton.cdiv(n, CHUNK))]
    place_ = [j for n in sizes for j in range(triton.cdiv(n, CHUNK))]
    made = [torch.tensor(sizes, dtype=torch.int64), torch.tensor(tensor, dtype=torch.int32), torch.tensor(place_, dtype=torch.int32)]
    return [t.to(device) for t in made]


def _table(tensors):
    return addresses(tuple(t.data_ptr() for t in tensors), tensors[0].device)


def total_norm(tensors):
    device = tensors[0].device
    sizes, tensor, place_ = chunks(tuple(t.numel() for t in tensors), device)
    partial = torch.empty(len(tensor), device=device)
    total_squares[(len(tensor),)](_table(tensors), sizes, tensor, place_, partial, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS)
    return partial.double().sum().sqrt().float()


def momentum_and_update(gradients, m, beta, nesterov, side, dtype, divisor):
    K, R, C = m.shape
    block = min(BLOCK // 4, triton.next_power_of_2(R * C))
    x = torch.empty(K * side, R, C // side, dtype=dtype, device=m.device)
    muon_momentum[(triton.cdiv(R * C, block), K)](
        _table(gradients), m, x, m if divisor is None else divisor, beta, R * C, C, SIDE=side, NESTEROV=nesterov,
        DIVIDE=divisor is not None, BLOCK=block, num_warps=WARPS // 2,
    )  # fmt: skip
    return x


def take_step(weights, updates, keep, size, side):
    R, C = weights[0].shape
    block = min(BLOCK // 4, triton.next_power_of_2(R * C))
    grid = (triton.cdiv(R * C, block), len(weights))
    muon_step[grid](_table(weights), updates, keep, size, R * C, C, SIDE=side, BLOCK=block, num_warps=WARPS // 2)
