"""What the steps of a solve multiplied with their head's matrices, and what came of it, made again for the backward pass: all states are known by
then, so that it takes one product over all steps.

`p` is the solve, as launch.Solve holds it.

Legend: B batch, T time, G matrices, S states, D = E K channels in E heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dense_rnn import matrices
from kernels.parallel_rnn.products import in_torch, is_leaf
from kernels.parallel_rnn.step import HeadMatrix


def states_before(p: Any, emitted: Tensor, starts: Tensor | None) -> Tensor:
    """The emitted state that each step starts from (B, T, D), in the dtype of products."""
    before = emitted.new_empty(emitted.shape)  # torch.cat takes four times the bytes' time here
    before[:, 0], before[:, 1:] = p.h0[:, -1], emitted[:, :-1]
    return before if starts is None else before.masked_fill_(starts[..., None], 0)


def by_head(p: Any, x: Tensor) -> Tensor:
    """(B, T, D) as (E, B T, K)."""
    return x.reshape(p.B * p.T, p.E, p.K).transpose(0, 1)


def emitted_alone(p: Any) -> bool:
    """Whether all that is multiplied with matrices is the emitted state."""
    return len(p.dense.operands) == 1 and is_leaf(p.dense.operands[0], f"h{p.S - 1}")


def products_and_operands(
    p: Any, before: Tensor, kept: Tensor, starts: Tensor | None, products: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """(products (E, B T, products, K) in fp32, where they are wanted, operands (E, B T, K) in the dtype of products) of all steps, at the known
    states."""
    dense, mat, Q = p.dense, p.mat.to(p.pre.dtype).to(before.dtype), len(p.dense.products)
    if emitted_alone(p):
        u = by_head(p, before)
        R = matrices.taken(mat, [product.matrix for product in dense.products]).reshape(p.E, p.K, Q * p.K) if products else mat
        return matrices.product_of(u, R).view(p.E, -1, Q, p.K) if products else None, [u]
    memory = torch.cat([p.h0[:, None, :-1], kept[:, :-1]], 1)
    memory = memory if starts is None else memory.masked_fill(starts[..., None, None], 0)
    x, w, h = p.pre.flatten(3).float().unbind(2), p.rec.unbind(0), [*memory.unbind(2), before.float()]
    rounded = [_Rounded(R, p, before.dtype) for R in mat.unbind(2)]
    found, operands = in_torch(p.cell).products(x, w, h, rounded)  # type: ignore[arg-type]
    return torch.stack([by_head(p, v) for v in found], 2) if products else None, [by_head(p, u.to(before.dtype)) for u in operands]


class _Rounded(HeadMatrix):
    """A matrix that rounds what it is multiplied with, as the kernels do."""

    def __init__(self, R_EKJ: Tensor, p: Any, dtype: torch.dtype) -> None:
        super().__init__(R_EKJ)
        self.p, self.dtype = p, dtype

    def __matmul__(self, x: Tensor) -> Tensor:
        return matrices.product_of(by_head(self.p, x.to(self.dtype)), self.R_EKJ).transpose(0, 1).reshape(self.p.B, self.p.T, self.p.D)
