"""The Triton kernel of symmetric products, and its launch; imported when it is first wanted.

Legend: k matrices, m rows, n columns.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.symmetric.sizes import DEPTH, TILE

WARPS, STAGES = 4, 3  # two programs a multiprocessor, so that one multiplies while the other stores; stages of loads ahead


@triton.jit
def _described_sum(X, Y, left, right, first, K, total, ONE: tl.constexpr, FLIPPED: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """total + a tile of x y^T: rows from `left` of x on, from `right` of y on. ONE: they are the same, and read once."""
    for n in range(0, K, DEPTH):
        if FLIPPED:
            x = X.load([first + n, left])
            total = tl.dot(tl.trans(x), x if ONE else Y.load([first + n, right]), total)
        else:
            x = X.load([first + left, n])
            total = tl.dot(x, tl.trans(x if ONE else Y.load([first + right, n])), total)
    return total


@triton.jit
def symmetric_product(
    X, Y, ADD, OUT, M, N, STRIDE_K, STRIDE_M, STRIDE_N, ALPHA, BETA, DIAGONAL,
    HAS_ADD: tl.constexpr, HAS_DIAGONAL: tl.constexpr, EACH: tl.constexpr, DESCRIBED: tl.constexpr, FLIPPED: tl.constexpr,
    SAME: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal, and its mirror image. EACH: ALPHA, BETA and DIAGONAL have a number for each matrix. DESCRIBED: X and Y are
    descriptors of (K M, N), or FLIPPED of (K N, M). SAME: y is x."""
    tile, k = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)  # before row i of tiles lie i (i + 1) / 2
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    down, across, inner = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), tl.float32)
    if DESCRIBED:
        first, left, right = k * (N if FLIPPED else M), i * TILE, j * TILE
        if SAME:
            if i == j:
                total = _described_sum(X, X, left, left, first, N, total, True, FLIPPED, TILE, DEPTH)
            else:
                total = _described_sum(X, Y, left, right, first, N, total, False, FLIPPED, TILE, DEPTH)
        else:
            total = _described_sum(X, Y, left, right, first, N, total, False, FLIPPED, TILE, DEPTH)
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
    tl.store(OUT + k * M * M + here, rounded)
    if i != j:
        tl.store(OUT + k * M * M + across[:, None] * M + down[None, :], tl.trans(rounded))


def symmetric(x, y, add, alpha, beta, diagonal):
    (K, M, N), same = x.shape, y is x
    if x.stride() != y.stride():
        x, y = x.contiguous(), y.contiguous()
    out = torch.empty(K, M, M, dtype=x.dtype, device=x.device)
    add, numbers = None if add is None else add.contiguous(), (alpha, beta, diagonal)
    each, has_diagonal = any(isinstance(n, torch.Tensor) for n in numbers), not isinstance(diagonal, float) or diagonal != 0.0
    if each:
        numbers = [n.float() if isinstance(n, torch.Tensor) else torch.full((K,), n, device=x.device) for n in numbers]
    tiles, flipped, given = M // TILE, x.stride(1) == 1, (x, y)
    if min(x.stride()[1:]) == 1 and x.stride(0) == M * N and _takes_descriptors(x.device):
        given = [_described(t, flipped) for t in (x, y)]
    symmetric_product[(tiles * (tiles + 1) // 2, K)](
        *given, out if add is None else add, out, M, N, *x.stride(), *numbers, HAS_ADD=add is not None, HAS_DIAGONAL=has_diagonal, EACH=each,
        DESCRIBED=given[0] is not x, FLIPPED=flipped, SAME=same, TILE=TILE, DEPTH=DEPTH, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def _takes_descriptors(device):
    """From Hopper on; elsewhere they would be taken apart again."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _described(t, flipped):
    """A descriptor of all matrices one below the other as they lie in memory, for blocks of TILE rows of t and DEPTH columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = (t.mT if flipped else t).flatten(0, 1)
    return TensorDescriptor.from_tensor(flat, [DEPTH, TILE] if flipped else [TILE, DEPTH])
