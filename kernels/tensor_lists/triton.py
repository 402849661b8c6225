"""Triton kernels over lists of tensors, and their launches; imported when one is first wanted.

Legend: k matrices, r rows, c columns.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import functools
import math

import torch
import triton
import triton.language as tl

CHUNK, BLOCK, WARPS = 65536, 4096, 8  # elements of a partial sum, and of a turn of its program
MOVED, TURN = 8192, 2048  # elements of a program of AdamW, and of its turn


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
    ADDRESSES, M, X, SQUARES, DIVISOR, BETA, EACH, C, SIDE: tl.constexpr, NESTEROV: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """SQUARES[k, b] = the sum of squares of what program b writes of X[k], of whole matrices (SIDE 1)."""
    divisor = 1.0
    if DIVIDE:
        divisor = tl.load(DIVISOR)
        if divisor - divisor != 0.0:  # no number: the step is left out
            return
    k = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < EACH
    base = k.to(tl.int64) * EACH
    address = tl.load(ADDRESSES + k).to(tl.pointer_type(tl.float32))
    g = tl.load(tl.multiple_of(address + e, 16), mask=inside, other=0.0)
    if DIVIDE:
        g = g / divisor
    m = tl.load(M + base + e, mask=inside, other=0.0)
    m += (1.0 - BETA) * (g - m)
    tl.store(M + base + e, m, mask=inside)
    x = m
    if NESTEROV:
        x = g + BETA * (m - g)
    tl.store(X + base + place(e, EACH, C, SIDE), x.to(X.dtype.element_ty), mask=inside)
    if SIDE == 1:
        x = tl.where(inside, x, 0.0)
        tl.store(SQUARES + k * tl.num_programs(0) + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit
def muon_scale(X, SCALE, OUT, EACH, BLOCK: tl.constexpr):
    """OUT[k] = SCALE[k] X[k], of another dtype."""
    k = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base, inside = k.to(tl.int64) * EACH, e < EACH
    x = tl.load(X + base + e, mask=inside, other=0.0).to(tl.float32) * tl.load(SCALE + k)
    tl.store(OUT + base + e, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def muon_step(ADDRESSES, U, DIVISOR, KEEP, STEP, EACH, C, SIDE: tl.constexpr, DIVIDE: tl.constexpr, BLOCK: tl.constexpr):
    if DIVIDE:
        divisor = tl.load(DIVISOR)
        if divisor - divisor != 0.0:
            return
    k = tl.program_id(1)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < EACH
    u = tl.load(U + k.to(tl.int64) * EACH + place(e, EACH, C, SIDE), mask=inside, other=0.0).to(tl.float32)
    w = tl.multiple_of(tl.load(ADDRESSES + k).to(tl.pointer_type(tl.float32)) + e, 16)
    tl.store(w, KEEP * tl.load(w, mask=inside, other=0.0) - STEP * u, mask=inside)


@triton.jit
def adamw_turn(w, g, m, v, e, left, divisor, keep, size, root, BETA1, BETA2, EPS, DIVIDE: tl.constexpr, MASKED: tl.constexpr):
    """One turn: elements e of weights w, gradients g and moments m, v (addresses), of which `left` are there."""
    w, g, m, v = tl.multiple_of(w + e, 16), tl.multiple_of(g + e, 16), tl.multiple_of(m + e, 16), tl.multiple_of(v + e, 16)
    if MASKED:
        inside = e < left
        weight, gradient = tl.load(w, mask=inside, other=0.0), tl.load(g, mask=inside, other=0.0)
        first, second = tl.load(m, mask=inside, other=0.0), tl.load(v, mask=inside, other=0.0)
    else:
        weight, gradient, first, second = tl.load(w), tl.load(g), tl.load(m), tl.load(v)
    if DIVIDE:
        gradient = gradient / divisor
    first += (1.0 - BETA1) * (gradient - first)
    second = BETA2 * second + (1.0 - BETA2) * gradient * gradient
    weight = keep * weight - size * first / (tl.sqrt_rn(second) / root + EPS)
    if MASKED:
        inside = e < left
        tl.store(w, weight, mask=inside)
        tl.store(m, first, mask=inside)
        tl.store(v, second, mask=inside)
    else:
        tl.store(w, weight)
        tl.store(m, first)
        tl.store(v, second)


@triton.jit
def adamw_step(
    ADDRESSES, SIZES, TENSOR, PLACE, DIVISOR, TENSORS, KEEP, LR, BETA1, BETA2, LOG1, LOG2, EPS,
    DIVIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Chunk PLACE[b] of tensor TENSOR[b]. ADDRESSES: of TENSORS weights, their gradients, both moments, and their counts of steps, this one among them.
    LOG1, LOG2: logarithms of the betas to the base 2."""
    b = tl.program_id(0)
    t = tl.load(TENSOR + b)
    w = tl.load(ADDRESSES + t).to(tl.pointer_type(tl.float32))
    g = tl.load(ADDRESSES + TENSORS + t).to(tl.pointer_type(tl.float32))
    m = tl.load(ADDRESSES + 2 * TENSORS + t).to(tl.pointer_type(tl.float32))
    v = tl.load(ADDRESSES + 3 * TENSORS + t).to(tl.pointer_type(tl.float32))
    divisor = 1.0
    if DIVIDE:
        divisor = tl.load(DIVISOR)
        if divisor - divisor != 0.0:  # no number: the step is left out
            return
    steps = tl.load(tl.load(ADDRESSES + 4 * TENSORS + t).to(tl.pointer_type(tl.float32))).to(tl.float64)
    size = (LR / (1.0 - tl.exp2(steps * LOG1))).to(tl.float32)
    root = tl.sqrt((1.0 - tl.exp2(steps * LOG2)).to(tl.float32))
    first = tl.load(PLACE + b).to(tl.int64) * CHUNK
    left = tl.load(SIZES + t)
    e = first + tl.arange(0, BLOCK)
    if left - first >= CHUNK:
        for i in range(0, CHUNK, BLOCK):
            adamw_turn(w, g, m, v, e + i, left, divisor, KEEP, size, root, BETA1, BETA2, EPS, DIVIDE, False)
    else:
        for i in range(0, CHUNK, BLOCK):
            adamw_turn(w, g, m, v, e + i, left, divisor, KEEP, size, root, BETA1, BETA2, EPS, DIVIDE, True)


@functools.lru_cache(maxsize=64)
def addresses(numbers, device):
    """(n,) int64 on `device`; the same ones are sent once, as under CUDA graphs, whose tensors stay where they are."""
    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=16)
def chunks(sizes, each, device):
    """(sizes, the tensor and the place in it of each chunk of `each` elements)."""
    tensor = [i for i, n in enumerate(sizes) for _ in range(triton.cdiv(n, each))]
    place_ = [j for n in sizes for j in range(triton.cdiv(n, each))]
    made = [torch.tensor(sizes, dtype=torch.int64), torch.tensor(tensor, dtype=torch.int32), torch.tensor(place_, dtype=torch.int32)]
    return [t.to(device) for t in made]


def _table(tensors, firsts=None):
    """Addresses of the tensors, or of their elements `firsts`, which are of 4 bytes."""
    numbers = (t.data_ptr() for t in tensors) if firsts is None else (t.data_ptr() + 4 * first for t, first in zip(tensors, firsts))
    return addresses(tuple(numbers), tensors[0].device)


def total_norm(tensors):
    device = tensors[0].device
    sizes, tensor, place_ = chunks(tuple(t.numel() for t in tensors), CHUNK, device)
    partial = torch.empty(len(tensor), device=device)
    total_squares[(len(tensor),)](_table(tensors), sizes, tensor, place_, partial, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS)
    return partial.double().sum().sqrt().float()


def momentum_and_update(gradients, firsts, m, beta, nesterov, side, dtype, divisor):
    K, R, C = m.shape
    block = min(BLOCK // 4, triton.next_power_of_2(R * C))
    programs = triton.cdiv(R * C, block)
    x = torch.empty(K * side, R, C // side, dtype=dtype, device=m.device)
    squares = torch.empty(K, programs, device=m.device)
    muon_momentum[(programs, K)](
        _table(gradients, firsts), m, x, squares, m if divisor is None else divisor, beta, R * C, C, SIDE=side, NESTEROV=nesterov,
        DIVIDE=divisor is not None, BLOCK=block, num_warps=WARPS // 2,
    )  # fmt: skip
    return x, squares.sum(1).sqrt() if side == 1 else None


def scaled(x, scale, dtype):
    K, R, C = x.shape
    out, block = torch.empty(x.shape, dtype=dtype, device=x.device), min(BLOCK, triton.next_power_of_2(R * C))
    muon_scale[(triton.cdiv(R * C, block), K)](x, scale, out, R * C, BLOCK=block, num_warps=WARPS)
    return out


def take_step(weights, firsts, shape, updates, keep, size, side, divisor):
    R, C = shape
    block = min(BLOCK // 4, triton.next_power_of_2(R * C))
    grid = (triton.cdiv(R * C, block), len(weights))
    given = updates if divisor is None else divisor
    muon_step[grid](
        _table(weights, firsts),
        updates,
        given,
        keep,
        size,
        R * C,
        C,
        SIDE=side,
        DIVIDE=divisor is not None,
        BLOCK=block,
        num_warps=WARPS // 2,
    )


def adamw_table(lists):
    """(addresses of all tensors, sizes of the weights, the weight and the place in it of each program)."""
    weights = lists.weights
    table = _table([*weights, *lists.gradients, *lists.moments, *lists.squares, *lists.steps])
    return (table, *chunks(tuple(t.numel() for t in weights), MOVED, weights[0].device))


def adamw(lists, lr, betas, eps, weight_decay, divisor):
    table, sizes, tensor, place_ = lists.table
    adamw_step[(len(tensor),)](
        table, sizes, tensor, place_, table if divisor is None else divisor, len(lists.weights), 1.0 - lr * weight_decay, lr, *betas,
        *(math.log2(beta) if beta else -1e4 for beta in betas), eps, DIVIDE=divisor is not None, CHUNK=MOVED, BLOCK=TURN, num_warps=WARPS,
    )  # fmt: skip
