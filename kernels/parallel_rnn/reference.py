"""Plain torch solvers of h_t = step(pre_t, rec, h_{t-1}); they run on any device and in float64, and are the oracle of the kernels.

`sequential` is the loop under autograd, the definition itself. `solve` computes the same states by the loop without a graph and
differentiates through the solution: with the Jacobians J_t at the known states, the adjoint g_{t-1} = J_t^T g_t + dL/dh_{t-1} is one
linear recurrence backwards in time, and all parameter gradients follow from one vector-Jacobian product over all steps at once
(arXiv 2510.21450, section 2.6). It saves inputs and states only.

Legend: B batch, T time, P input projections, R recurrent weights, S states, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn.cell import Cell


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Arithmetic inside a solve: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sequential(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(states (B, T, S, D), final (B, S, D)) by the loop; autograd flows through every step. Arguments in the dtype of the arithmetic."""
    state = h0_BSD.unbind(1)
    rec = rec_RD.unbind(0)
    out = []
    for t in range(pre_BTPD.shape[1]):
        if starts_BT is not None:
            keep = (~starts_BT[:, t, None]).to(pre_BTPD.dtype)
            state = tuple(s * keep for s in state)
        state = tuple(cell(pre_BTPD[:, t].unbind(1), rec, state))
        out.append(torch.stack(state, 1))
    states_BTSD = torch.stack(out, 1) if out else pre_BTPD.new_zeros(pre_BTPD.shape[0], 0, len(cell.state), pre_BTPD.shape[-1])
    return states_BTSD, torch.stack(state, 1)


def previous(states_BTSD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> Tensor:
    """The state each step started from: the one before it, h0 at the first, zero where a document starts."""
    before = torch.cat([h0_BSD[:, None], states_BTSD[:, :-1]], 1)
    return before if starts_BT is None else before * (~starts_BT[:, :, None, None]).to(before.dtype)


class _Solve(torch.autograd.Function):
    """Forward by the loop without a graph, backward by one reversed linear recurrence."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        states, final = sequential(cell, pre, rec, h0, starts)
        ctx.save_for_backward(pre, rec, h0, states, *(() if starts is None else (starts,)))
        ctx.cell = cell
        return states, final

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        pre, rec, h0, states, *rest = ctx.saved_tensors
        starts = rest[0] if rest else None
        return (None, *linear_backward(ctx.cell, pre, rec, h0, starts, states, *gradients), None)


def jacobian(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, before_BTSD: Tensor) -> Tensor:
    """d state_i / d previous state_j for every step and channel: (B, T, S, S, D) as [i, j]."""
    pre, rec, state = pre_BTPD.unbind(2), rec_RD.unbind(0), before_BTSD.unbind(2)
    columns = []
    for j in range(len(state)):
        tangents = tuple(torch.ones_like(s) if i == j else torch.zeros_like(s) for i, s in enumerate(state))
        _, column = torch.func.jvp(lambda *s: tuple(cell(pre, rec, s)), state, tangents)
        columns.append(torch.stack(column, 2))
    return torch.stack(columns, 3)


def linear_backward(
    cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, states: Tensor, d_states: Tensor, d_final: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre, rec and h0 given those of all states and of the final one."""
    before = previous(states, h0, starts)
    with torch.no_grad():
        J = jacobian(cell, pre, rec, before)
        if starts is not None:
            J = J * (~starts[:, :, None, None, None]).to(J.dtype)
        adjoint = torch.empty_like(d_states)
        carried = d_final
        for t in range(states.shape[1] - 1, -1, -1):
            total = d_states[:, t] + carried
            adjoint[:, t] = total
            carried = (J[:, t] * total[:, :, None]).sum(1)
    with torch.enable_grad():
        pre_, rec_ = pre.detach().requires_grad_(), rec.detach().requires_grad_()
        new = cell(pre_.unbind(2), rec_.unbind(0), before.detach().unbind(2))
        wanted = [pre_, rec_] if rec.numel() else [pre_]
        found = torch.autograd.grad(torch.stack(tuple(n.expand_as(states[:, :, 0]) for n in new), 2), wanted, adjoint, allow_unused=True)
    d_pre = found[0] if found[0] is not None else torch.zeros_like(pre)
    d_rec = found[1] if len(found) > 1 and found[1] is not None else torch.zeros_like(rec)
    return d_pre, d_rec, carried


def solve(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Same values as `sequential`; the backward pass keeps no graph of the loop."""
    states, final = _Solve.apply(cell, pre_BTPD, rec_RD, h0_BSD, starts_BT)
    return states, final
