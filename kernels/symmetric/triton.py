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
def _tile(MATRIX, k, M, i, j, DESCRIBED: tl.constexpr, TILE: tl.constexpr):
    """Tile (i, j) of matrix k of (K, M, M)."""
    if DESCRIBED:
        return MATRIX.load([k * M + i * TILE, j * TILE])
    else:
        down, across = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        return tl.load(MATRIX + k.to(tl.int64) * M * M + down[:, None] * M + across[None, :])


@triton.jit
def symmetric_product(
    X, Y, ADD, SELF, OUT, M, N, STRIDE_K, STRIDE_M, STRIDE_N, ALPHA, BETA, DIAGONAL, OWN,
    HAS_ADD: tl.constexpr, HAS_OWN: tl.constexpr, HAS_DIAGONAL: tl.constexpr, EACH: tl.constexpr, DESCRIBED: tl.constexpr, FLIPPED: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal, and its mirror image. SELF: X, symmetric, of which OWN is added. EACH: ALPHA, BETA and DIAGONAL have a number for
    each matrix. DESCRIBED: all matrices are descriptors, X and Y of (K M, N), or FLIPPED of (K N, M), the others of (K M, M)."""
    tile, k = tl.program_id(0), tl.program_id(1)
    i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)  # before row i of tiles lie i (i + 1) / 2
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    j = tile - i * (i + 1) // 2
    down, across, inner = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), tl.float32)
    if DESCRIBED:
        for n in range(0, N, DEPTH):
            if FLIPPED:
                total = tl.dot(tl.trans(X.load([k * N + n, i * TILE])), Y.load([k * N + n, j * TILE]), total)
            else:
                total = tl.dot(X.load([k * M + i * TILE, n]), tl.trans(Y.load([k * M + j * TILE, n])), total)
    else:
        x = X + k.to(tl.int64) * STRIDE_K + down[:, None] * STRIDE_M + inner[None, :] * STRIDE_N
        y = Y + k.to(tl.int64) * STRIDE_K + across[:, None] * STRIDE_M + inner[None, :] * STRIDE_N
        for _ in range(0, N, DEPTH):
            total = tl.dot(tl.load(x), tl.trans(tl.load(y)), total)
            x += DEPTH * STRIDE_N
            y += DEPTH * STRIDE_N
    alpha, beta, diagonal = ALPHA, BETA, DIAGONAL
    if EACH:
        alpha, beta, diagonal = tl.load(ALPHA + k), tl.load(BETA + k), tl.load(DIAGONAL + k)
    total *= alpha
    if HAS_ADD:
        total += beta * _tile(ADD, k, M, i, j, DESCRIBED, TILE).to(tl.float32)
    if HAS_OWN:
        total += OWN * _tile(SELF, k, M, i, j, DESCRIBED, TILE).to(tl.float32)
    if HAS_DIAGONAL:
        total += tl.where(down[:, None] == across[None, :], diagonal, 0.0)
    if DESCRIBED:
        rounded = total.to(OUT.dtype)
        OUT.store([k * M + i * TILE, j * TILE], rounded)
        if i != j:
            OUT.store([k * M + j * TILE, i * TILE], tl.trans(rounded))
    else:
        rounded = total.to(OUT.dtype.element_ty)
        here = OUT + k.to(tl.int64) * M * M
        tl.store(here + down[:, None] * M + across[None, :], rounded)
        if i != j:
            tl.store(here + across[:, None] * M + down[None, :], tl.trans(rounded))


def symmetric(x, y, add, alpha, beta, diagonal, own):
    K, M, N = x.shape
    if x.stride() != y.stride():
        x, y = x.contiguous(), y.contiguous()
    out = torch.empty(K, M, M, dtype=x.dtype, device=x.device)
    add, numbers = None if add is None else add.contiguous(), (alpha, beta, diagonal)
    each, has_diagonal = any(isinstance(n, torch.Tensor) for n in numbers), not isinstance(diagonal, float) or diagonal != 0.0
    if each:
        numbers = [n.float() if isinstance(n, torch.Tensor) else torch.full((K,), n, device=x.device) for n in numbers]
    tiles, flipped = M // TILE, x.stride(1) == 1
    described = min(x.stride()[1:]) == 1 and x.stride(0) == M * N and _takes_descriptors(x.device)
    given, square = [x, y], [out if add is None else add, x.contiguous() if own else out, out]
    if described:
        given = [_described(t.mT if flipped else t, [DEPTH, TILE] if flipped else [TILE, DEPTH]) for t in given]
        square = [_described(t, [TILE, TILE]) for t in square]
    symmetric_product[(tiles * (tiles + 1) // 2, K)](
        *given, *square, M, N, *x.stride(), *numbers, own, HAS_ADD=add is not None, HAS_OWN=own != 0.0, HAS_DIAGONAL=has_diagonal, EACH=each,
        DESCRIBED=described, FLIPPED=flipped, TILE=TILE, DEPTH=DEPTH, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def _takes_descriptors(device):
    """From Hopper on; elsewhere they would be taken apart again."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def _described(t, block):
    """A descriptor of all matrices of t, contiguous, one below the other, by blocks of so many rows and columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(t.flatten(0, 1), block)
