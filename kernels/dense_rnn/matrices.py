"""The gradient of the matrices of dense heads: one batched product of operands and cotangents over all steps, after the walk.

`p` is the solve, as launch.Solve holds it.

Legend: B batch, T time, P input projections, G matrices, D = E K channels in E heads, m heads side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn.source import Writer
from kernels.parallel_rnn.launch import Layout

ROW = 8  # columns that a row of ones takes beside an operand, so that rows stay aligned
SIDE_BY_SIDE = 4  # heads whose matrices' gradients are taken in one product, of which one in so many entries is wanted


def product_of(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in fp32."""
    if a.is_cuda and a.element_size() == 2:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def cotangents_in(to: Layout, d_whole: Tensor, K: int, written: Writer) -> Tensor | None:
    """The products' cotangents (blocks, B T, P, channels of a block) where they are the gradients of inputs that lie in few heads' blocks, as models
    have them: a product with all of a block costs less than storing each head's own once more in every pass."""
    blocks = to.tensor.permute(3, 0, 1, 2, 4)
    few = to.head % K == 0 and to.head // K <= SIDE_BY_SIDE
    fits = written.as_inputs and few and to.tensor.data_ptr() == d_whole.data_ptr() and blocks.is_contiguous()
    return blocks.flatten(1, 2) if fits else None


def before_with_ones(p: Any, emitted: Tensor, starts: Tensor | None, blocks: int) -> Tensor:
    """An operand of `gradient`, beside it a row of ones: the emitted state that each step starts from, (blocks, B T, D / blocks + ROW)."""
    each = p.D // blocks
    u = emitted.new_empty(blocks, p.B, p.T, each + ROW)
    states, by_block = u[..., :each], emitted.unflatten(2, (blocks, each)).permute(2, 0, 1, 3)
    states[:, :, 1:] = by_block[:, :, :-1]
    states[:, :, 0] = p.h0[:, -1].unflatten(1, (blocks, each)).transpose(0, 1)
    if starts is not None:
        states.masked_fill_(starts[None, :, :, None], 0)
    u[..., each:] = 0
    u[..., each] = 1
    return u.flatten(1, 2)


def gradient(
    p: Any, operands: list[Tensor], d_prod: Tensor, as_ones: dict[int, int] | None = None, places: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """((E, K, G, K) in fp32: operand^T cotangent over all steps, in pieces so that there are enough to fill the device; of the weights `as_ones` the
    sums (D,) of their product's cotangents, one more row of it). The cotangents (E / m, B T, products, m K), of m heads side by side, lie as they are
    multiplied: those of an operand are neighbours, where nothing comes between. places: of each product in them, if it is another. An operand is (E, B T, K), or as
    `before_with_ones` makes it."""
    m, places = p.E // d_prod.shape[0], places or range(len(p.dense.products))
    d_mat, sums = torch.zeros(p.E, p.K, p.G, p.K, device=d_prod.device), dict[int, Tensor]()
    N, products, as_ones = p.B * p.T, p.dense.products, as_ones or {}
    pieces = next(c for c in (16 if m == 1 else 8, 8, 4, 2, 1) if N % c == 0)

    def piecewise(u: Tensor, d: Tensor) -> Tensor:
        u, d = (v.unflatten(1, (pieces, N // pieces)).flatten(0, 1) for v in (u, d))
        return product_of(u.transpose(1, 2), d).unflatten(0, (p.E // m, pieces)).sum(1)

    for operand, group in itertools.groupby(range(len(products)), key=lambda i: products[i].operand):
        mine, u = list(group), operands[operand]
        if u.shape[2] == p.K:
            u = u if m == 1 else u.transpose(0, 1).reshape(N, p.E // m, m * p.K).transpose(0, 1)
            if as_ones:
                one = torch.zeros(1, 1, ROW, dtype=u.dtype, device=u.device)
                one[:, :, 0] = 1
                u = torch.cat([u, one.expand(p.E // m, N, ROW)], 2)
        first, last = min(places[i] for i in mine), max(places[i] for i in mine)
        found = piecewise(u, d_prod[:, :, first : last + 1].flatten(2)).unflatten(2, (-1, m * p.K))
        # of heads side by side, each one's own: what lies between two of them is no gradient
        each = found[:, : m * p.K].unflatten(1, (m, p.K)).unflatten(4, (m, p.K)).diagonal(0, 1, 4).movedim(-1, 1).flatten(0, 1)
        for i in mine:
            d_mat[:, :, products[i].matrix] += each[:, :, places[i] - first]
            sums |= {r: found[:, m * p.K, places[i] - first].flatten() for r, product in as_ones.items() if product == i}
    return d_mat, sums
