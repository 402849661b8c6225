"""The gradient of the matrices of dense heads: one product of operands and cotangents over all steps, after the walk. In 16 bits a kernel takes it
(triton.py), in fp32 the library's batched product.

`p` is the solve, as launch.Solve holds it.

Legend: B batch, T time, N = B T, P input projections, G matrices, D = E K channels in E heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn.launch import Layout, multiprocessors

ROW = 8  # columns that a row of ones takes beside an operand, so that rows stay aligned
PIECES, PARTIAL = (
    16,
    1 << 23,
)  # of the steps, in the library's product, and the most values that they may sum up to: a large head's fill the device
ACROSS, STAGES = 256, 4  # of a program of the kernel: columns of cotangents, the most, and tiles on their way


def product_of(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in fp32."""
    if a.is_cuda and a.element_size() == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def taken(mat: Tensor, which: Sequence[int]) -> Tensor:
    """These matrices of mat (E, K, G, K). An index would come from the host, which a CUDA graph cannot hold."""
    first = which[0]
    if list(which) == list(range(first, first + len(which))):  # neighbours are not copied
        return mat[:, :, first : first + len(which)]
    return torch.stack([mat[:, :, g] for g in which], 2)


class Cotangents:
    """Those of the products, as they lie: like inputs (B, T, products, blocks, channels of a block), or head by head (E, N, products, K). places: of each product in them."""

    def __init__(self, p: Any, like_inputs: Layout | None, by_head: Tensor, places: Sequence[int]) -> None:
        Q = len(p.dense.products)
        self.places = places if like_inputs is not None else range(Q)
        self.tensor = by_head if like_inputs is None else like_inputs.tensor
        self.strides = (p.T * Q * p.K, Q * p.K, p.K, p.B * p.T * Q * p.K)
        self.head = p.K
        if like_inputs is not None:
            self.strides = (like_inputs.batch, like_inputs.time, like_inputs.projection, like_inputs.se)
            self.head = like_inputs.head


def groups(p: Any, places: Sequence[int]) -> list[tuple[int, list[int], int, int]]:
    """Products that have an operand in common and follow one another: (the operand, products, the first and the last of their places)."""
    products = p.dense.products
    found = [(operand, list(group)) for operand, group in itertools.groupby(range(len(products)), key=lambda i: products[i].operand)]
    return [(operand, mine, min(places[i] for i in mine), max(places[i] for i in mine)) for operand, mine in found]


def tile(P: int, width: int) -> tuple[int, int, int]:
    """Columns, rows of a tile, and warps of a program, of P products that are `width` wide: sums take a quarter to a half of the registers."""
    across = min(ACROSS, 1 << (P * width - 1).bit_length())
    return across, 64 if width <= 64 else 32, 8 if width * across >= 1 << 14 else 4


def kernel() -> Any:
    """Triton is imported here only."""
    from kernels.dense_rnn import triton

    return triton.gradient_of_matrices


def gradient_by_kernel(
    p: Any, emitted: Tensor, h0_emitted: Tensor, operands: list[Tensor] | None, d: Cotangents, as_ones: dict[int, int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """`gradient` in 16 bits. operands: (E, N, K) each, or None where the only one is the emitted state (B, T, D) before each step, h0_emitted (B, D)
    before the first."""
    N, width = p.B * p.T, p.constants["BK"]
    d_mat, sums = p.h0.new_zeros(p.E, p.K, p.G, p.K), dict[int, Tensor]()
    found = groups(p, d.places)
    for operand, mine, first, last in found:
        P = last - first + 1
        across, rows, warps = tile(P, width)
        programs, most = p.E * -(-P * width // across), multiprocessors(p.pre.device)
        pieces = max(1, (most if programs <= most // 2 else 4 * most) // programs)
        piece = -(-N // (pieces * rows)) * rows
        pieces = -(-N // piece)
        partial = p.h0.new_empty(pieces, p.E * (p.K + 1) * P * p.K)
        u = emitted if operands is None else operands[operand].transpose(0, 1).reshape(N, p.D)
        kernel()[p.E, pieces, -(-P * width // across)](
            u, h0_emitted, p.reset, d.tensor[:, :, first:], partial, N, p.T, piece, *d.strides, P, p.K, p.D, d.head,
            operands is None, p.constants["HAS_RESET"], p.constants["DOT"], rows, width, across, STAGES,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
        of_matrices, of_ones = partial.sum(0).split((p.E * p.K * P * p.K, p.E * P * p.K))
        each, ones = of_matrices.view(p.E, p.K, P, p.K), of_ones.view(p.E, P, p.K)
        in_order = [p.dense.products[i].matrix for i in sorted(mine, key=lambda i: d.places[i])] == list(range(p.G)) and p.G == P
        if in_order and len(found) == 1:
            d_mat = each  # one product for each matrix, in their order
        else:
            for i in mine:
                d_mat[:, :, p.dense.products[i].matrix] += each[:, :, d.places[i] - first]
        for r, product in as_ones.items():
            sums |= {r: ones[:, d.places[product] - first].flatten()} if product in mine else {}
    return d_mat, sums


def gradient(p: Any, operands: list[Tensor], d_prod: Tensor, as_ones: dict[int, int] | None = None) -> tuple[Tensor, dict[int, Tensor]]:
    """((E, K, G, K) in fp32: operand^T cotangent over all steps, in pieces so that there are enough to fill the device; of the weights `as_ones` the
    sums (D,) of their product's cotangents, one more row of it). The cotangents (E, N, products, K) lie as they are multiplied: those of an operand
    (E, N, K) are neighbours."""
    N, as_ones, sums = p.B * p.T, as_ones or {}, dict[int, Tensor]()
    in_order = len(p.dense.operands) == 1 and [product.matrix for product in p.dense.products] == list(range(p.G))
    d_mat = d_prod.new_empty(0) if in_order else torch.zeros(p.E, p.K, p.G, p.K, device=d_prod.device)
    each = p.E * p.K * len(p.dense.products) * p.K
    pieces = next(c for c in (PIECES, 8, 4, 2, 1) if N % c == 0 and (c * each <= PARTIAL or c == 1))
    for operand, mine, first, last in groups(p, range(len(p.dense.products))):
        u, d = operands[operand], d_prod[:, :, first : last + 1].flatten(2)
        if as_ones:
            one = torch.zeros(1, 1, ROW, dtype=u.dtype, device=u.device)
            one[:, :, 0] = 1
            u = torch.cat([u, one.expand(p.E, N, ROW)], 2)
        u, d = (v.unflatten(1, (pieces, N // pieces)).flatten(0, 1) for v in (u, d))
        found = product_of(u.transpose(1, 2), d).unflatten(0, (p.E, pieces)).sum(1).unflatten(2, (-1, p.K))
        if in_order:
            d_mat = found[:, : p.K].contiguous()  # one product for each matrix, in their order
        for i in mine:
            if not in_order:
                d_mat[:, :, p.dense.products[i].matrix] += found[:, : p.K, i - first]
            sums |= {r: found[:, p.K, i - first].flatten() for r, product in as_ones.items() if product == i}
    return d_mat, sums
