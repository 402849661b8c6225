"""The Triton kernel of symmetric products, and its launch; imported when it is first wanted.

Legend: k matrices, m rows, n columns.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.symmetric.sizes import DEPTH, TILE


class Blocks(NamedTuple):
    """How a result is cut, and its programs run: tiles of TILE rows and `across` columns."""

    across: int = TILE
    warps: int = 4
    stages: int = 3  # of loads ahead
    depth: int = DEPTH  # columns of x taken at a time
    described: bool = False  # loads by descriptors (TMA)


CHOSEN = Blocks(described=True)  # two programs a multiprocessor, so that one multiplies while the other stores


@triton.jit
def symmetric_product(
    X, Y, ADD, OUT, M, N, STRIDE_K, STRIDE_M, STRIDE_N, ALPHA, BETA, DIAGONAL,
    HAS_ADD: tl.constexpr, HAS_DIAGONAL: tl.constexpr, EACH: tl.constexpr, DESCRIBED: tl.constexpr, FLIPPED: tl.constexpr,
    TILE: tl.constexpr, ACROSS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile that is in part on or below the diagonal, that part and its mirror image. EACH: ALPHA, BETA and DIAGONAL have a number for each matrix.
    DESCRIBED: X and Y are descriptors of (K M, N), or FLIPPED of (K N, M)."""
    tile, k = tl.program_id(0), tl.program_id(1)
    RATIO: tl.constexpr = ACROSS // TILE  # rows of tiles that reach equally far: before group g of them lie RATIO g (g + 1) / 2 tiles
    g = ((tl.sqrt(8.0 * (tile // RATIO).to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    g = tl.where(RATIO * (g * (g + 1) // 2) > tile, g - 1, g)
    g = tl.where(RATIO * ((g + 1) * (g + 2) // 2) <= tile, g + 1, g)
    left = tile - RATIO * (g * (g + 1) // 2)
    i, j = g * RATIO + left // (g + 1), left % (g + 1)
    down, across, inner = i * TILE + tl.arange(0, TILE), j * ACROSS + tl.arange(0, ACROSS), tl.arange(0, DEPTH)
    total = tl.zeros((TILE, ACROSS), tl.float32)
    if DESCRIBED:
        for n in range(0, N, DEPTH):
            if FLIPPED:
                total = tl.dot(tl.trans(X.load([k * N + n, i * TILE])), Y.load([k * N + n, j * ACROSS]), total)
            else:
                total = tl.dot(X.load([k * M + i * TILE, n]), tl.trans(Y.load([k * M + j * ACROSS, n])), total)
        k = k.to(tl.int64)
    else:
        k = k.to(tl.int64)
        x = X + k * STRIDE_K + down[:, None] * STRIDE_M + inner[None, :] * STRIDE_N
        y = Y + k * STRIDE_K + across[:, None] * STRIDE_M + inner[None, :] * STRIDE_N
        for _ in range(0, N, DEPTH):
            total = tl.dot(tl.load(x), tl.trans(tl.load(y)), total)
            x += DEPTH * STRIDE_N
            y += DEPTH * STRIDE_N
    alpha, beta, diagonal = ALPHA, BETA, DIAGONAL
    if EACH:
        alpha, beta, diagonal = tl.load(ALPHA + k), tl.load(BETA + k), tl.load(DIAGONAL + k)
    total *= alpha
    here = down[:, None] * M + across[None, :]
    if HAS_ADD:
        total += beta * tl.load(ADD + k * M * M + here).to(tl.float32)
    if HAS_DIAGONAL:
        total += tl.where(down[:, None] == across[None, :], diagonal, 0.0)
    rounded = total.to(OUT.dtype.element_ty)
    there = across[:, None] * M + down[None, :]
    if RATIO == 1:
        tl.store(OUT + k * M * M + here, rounded)
        if i != j:
            tl.store(OUT + k * M * M + there, tl.trans(rounded))
    else:
        tl.store(OUT + k * M * M + here, rounded, mask=(across // TILE <= i)[None, :])
        tl.store(OUT + k * M * M + there, tl.trans(rounded), mask=(across // TILE < i)[:, None])


def symmetric(x, y, add, alpha, beta, diagonal):
    K, M, N = x.shape
    if x.stride() != y.stride():
        x, y = x.contiguous(), y.contiguous()
    out = torch.empty(K, M, M, dtype=x.dtype, device=x.device)
    add, numbers = None if add is None else add.contiguous(), (alpha, beta, diagonal)
    each, has_diagonal = any(isinstance(n, torch.Tensor) for n in numbers), not isinstance(diagonal, float) or diagonal != 0.0
    if each:
        numbers = [n.float() if isinstance(n, torch.Tensor) else torch.full((K,), n, device=x.device) for n in numbers]
    blocks = CHOSEN if M % CHOSEN.across == 0 and N % CHOSEN.depth == 0 else Blocks()
    groups, flipped, given = M // blocks.across, x.stride(1) == 1, (x, y)
    if blocks.described and min(x.stride()[1:]) == 1 and x.stride(0) == M * N and _takes_descriptors(x.device):
        given = [_described(t, flipped, rows, blocks.depth) for t, rows in ((x, TILE), (y, blocks.across))]
    symmetric_product[(blocks.across // TILE * groups * (groups + 1) // 2, K)](
        *given, out if add is None else add, out, M, N, *x.stride(), *numbers, HAS_ADD=add is not None, HAS_DIAGONAL=has_diagonal, EACH=each,
        DESCRIBED=given[0] is not x, FLIPPED=flipped, TILE=TILE, ACROSS=blocks.across, DEPTH=blocks.depth,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return out


def _takes_descriptors(device):
    """From Hopper on; elsewhere they would be taken apart again."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _described(t, flipped, rows, depth):
    """A descriptor of all matrices one below the other as they lie in memory, for blocks of `rows` rows of t and `depth` columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = (t.mT if flipped else t).flatten(0, 1)
    return TensorDescriptor.from_tensor(flat, [depth, rows] if flipped else [rows, depth])
