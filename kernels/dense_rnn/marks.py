"""Saved borders in place of all states: the states that slices start from, from which the backward pass makes the others again.

Legend: B batch, T time, M marks, S states, D = E K channels in E heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dense_rnn import launch
from kernels.dense_rnn.plans import Layer
from kernels.parallel_rnn.cell import Cell


def marks_of(T: int) -> int:
    """Rows of marks: for each slice that there may be, and one behind them."""
    return max(1, T // launch.SHORTEST) + 1


def forward_with_marks(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, plan: launch.Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`forward` with marks (B, M, S, D) in place of the kept states: those that slices start from, and in the last row the first slice of each
    head that was walked in order."""
    emitted, _, final, _, _, begins, bad = launch.solved(cell, pre, rec, mat, h0, starts, plan, layer, halves, join=False)
    marks = begins.new_zeros(begins.shape[0], marks_of(pre.shape[1]), *begins.shape[2:])
    marks[:, : begins.shape[1]] = begins
    marks[:, -1] = bad.repeat_interleave(begins.shape[3] // bad.shape[1], 1)[:, None]
    return emitted, marks, final


def restore(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, marks: Tensor, plan: launch.Plan | None = None,
    layer: Layer | None = None, halves: bool = False,
) -> Tensor:  # fmt: skip
    """The kept states (B, T, S - 1, D), bit for bit, by one more pass under the plan that marks were made with."""
    plan = plan or launch.in_force(cell, pre, mat.shape[1], layer, False)
    p = launch.Problem(cell, pre, rec, launch.joined(mat), h0, starts, plan, halves)
    n, S = plan.slices, p.S
    emitted, kept, final = (
        (p.h0 if halves else p.pre).new_empty(p.B, p.T, p.D),
        p.h0.new_empty(p.B, p.T, S - 1, p.D),
        torch.empty_like(p.h0),
    )
    begins, ends, nearby, products = marks[:, :n].contiguous(), p.per_slice(S), p.per_slice(S), p.per_slice(p.tracked)
    todo = torch.ones(p.B, n, p.E, dtype=torch.int32, device=pre.device)
    bad = marks[:, -1, 0, :: p.K].to(torch.int32).contiguous()
    shared = (p.at.tensor, p.rec, p.on_chip())
    joins, how = p.joins(todo, False)
    walked = (*shared, p.h0, p.reset, emitted, kept, begins, ends, products, nearby, todo, *joins, plan.burn_in)
    p.module.walk[p.grid](*walked, False, False, *how, *p.sizes, **p.constants)
    if n > 1:
        p.module.finish[p.E, -(-p.B // plan.rows)](*shared, p.reset, emitted, kept, ends, bad, final, *p.sizes, **p.constants)
    return kept
