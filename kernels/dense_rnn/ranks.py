"""A recurrence that is dense in its heads, cut over ranks: each solves its own part of time, and what lies between the parts is found as it is
between slices (reference.py): guesses by a burn-in, corrections by the diagonal Jacobian products, a certificate at every border.

The adjoint takes the same way back, from a burn-in at the part's beginning. N - 1 corrections make every part exact, whatever the matrices are.
All ranks hold the same numbers, so all stop together. How tensors get from rank to rank is the caller's.

Legend: B batch, T time of a part, N ranks, S states, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dense_rnn import launch, op, plans, reference
from kernels.dense_rnn.reference import TOLERANCE
from kernels.parallel_rnn.cell import REGISTRY, Cell
from kernels.parallel_rnn.op import flat, joined
from kernels.parallel_rnn.products import in_torch
from kernels.parallel_rnn.reference import corrected, previous, product, share

BURN_IN = 512  # steps at a border whose walk from zero is the first guess of what crosses it
PIECE = 256  # steps whose Jacobians are held at a time in plain torch


@dataclass(frozen=True)
class Part:
    """This rank's place, how all ranks' tensors are gathered to (N, ...), what counts "solves", "corrections" and "adjoints", and the layer that
    learns (plans.py)."""

    rank: int
    size: int
    gather: Callable[[Tensor, str], Tensor]
    count: Callable[[str], None]
    learner: int = 0


def border(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, states: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the diagonal Jacobian product of all steps (B, S, S, D), the channels' size near the end (B, S, D)) at the solved states."""
    made, matrix, whole = in_torch(cell), reference.matrices(mat), None
    before = previous(states, h0, starts)
    for first in range(0, pre.shape[1], PIECE):
        at = slice(first, first + PIECE)
        J = reference.diagonal(made, pre[:, at], rec, matrix, before[:, at], None if starts is None else starts[:, at])
        P = product(J[:, None])[:, 0]
        whole = P if whole is None else (P[:, :, :, None] * whole[:, None]).sum(2)
    assert whole is not None
    return whole, reference.local_size(states[:, None], None if starts is None else starts[:, None])[:, 0]


def _solved(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, learner: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(emitted, kept, final) of a part, its diagonal product, and its channels' size near the end."""
    if op.kernels_for(pre, mat.shape[1]) is launch and op.use_triton(cell, pre, mat.shape[1], "auto"):
        with torch.cuda.device_of(pre):
            return launch.forward_with_border(cell, pre, rec, mat, h0, starts, layer=plans.find(learner))
    dtype = reference.compute_dtype(pre)
    emitted, kept, final = op.solve(pre, rec, mat, h0, starts, cell.key, "auto", learner, False, False)
    states = joined(emitted.to(dtype), kept)
    return emitted, kept, final, *border(cell, flat(pre).to(dtype), rec.to(dtype), mat.to(dtype), h0, starts, states)


def _back(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor, d_emitted: Tensor,
    d_final: Tensor, learner: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of pre, rec, mat and h0, and the adjoint's size near the part's beginning."""
    layer = plans.find(learner)
    if op.use_triton(cell, pre, mat.shape[1], "auto"):
        given = (cell, pre, rec, mat, h0, starts, emitted, kept, d_emitted, None, d_final)
        with torch.cuda.device_of(pre):
            return op.kernels_for(pre, mat.shape[1]).backward_with_border(*given, layer=layer)
    dtype = reference.compute_dtype(pre)
    states, d_states = joined(emitted.to(dtype), kept), joined(d_emitted.to(dtype), torch.zeros_like(kept))
    x, w, R = flat(pre).to(dtype), rec.to(dtype), mat.to(dtype)
    slices_and_burn_in = op.chosen(pre, h0, layer, True)
    d_pre, *others = reference.backward_with_border(cell, x, w, R, h0, starts, states, d_states, d_final, *slices_and_burn_in)
    op.note(layer, True, reference.last_backward, pre.shape[0] * mat.shape[0])
    return torch.empty_like(pre).copy_(d_pre.view(pre.shape)), *others


def _between(part: Part, end: Tensor, size: Tensor, P: Tensor, purpose: str) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, ...) of all parts: ends, sizes, diagonal products."""
    every = part.gather(torch.cat([end[:, None], size[:, None], P], 1), purpose).transpose(0, 1)
    ends, sizes, products = every.split([1, 1, P.shape[1]], 2)
    return ends[:, :, 0], sizes[:, :, 0], products


@torch.no_grad()
def _guess(part: Part, cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, starts: Tensor | None, zero: Tensor) -> Tensor:
    """(B, N, S, D): zero, then what the last steps of each part alone end in."""
    first = max(0, pre.shape[1] - BURN_IN)
    end = op.solve(
        pre[:, first:], rec, mat, zero, None if starts is None else starts[:, first:].contiguous(), cell.key, "auto", 0, False, False
    )[2]
    ends = part.gather(end, "states").transpose(0, 1)
    return torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)


class _Over(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, rec: Tensor, mat: Tensor, starts: Tensor | None, key: str, part: Part) -> Tensor:
        cell, limit = REGISTRY[key], TOLERANCE[pre.dtype]
        zero = torch.zeros(pre.shape[0], len(cell.state), rec.shape[-1], dtype=reference.compute_dtype(pre), device=pre.device)
        start = _guess(part, cell, pre, rec, mat, starts, zero)
        for correction in range(part.size):
            h0 = start[:, part.rank].contiguous()
            emitted, kept, final, P, size = _solved(cell, pre, rec, mat, h0, starts, part.learner)
            part.count("solves")
            if correction == part.size - 1:
                break
            ends, sizes, products = _between(part, final, size, P, "checks")
            new = corrected(ends, products, start)
            if share((new - start)[:, 1:], reference.certified_size(cell, sizes[:, :-1], limit)) <= limit:
                break
            part.count("corrections")
            start = new
        ctx.key, ctx.part = key, part
        ctx.save_for_backward(pre, rec, mat, starts, h0, emitted, kept, P)
        return emitted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre, rec, mat, starts, h0, emitted, kept, P = ctx.saved_tensors
        cell, part, d_emitted, zero = REGISTRY[ctx.key], ctx.part, gradients[0].contiguous(), torch.zeros_like(h0)
        with torch.autocast(pre.device.type, enabled=False):
            W = slice(0, min(BURN_IN, pre.shape[1]))
            early = (pre[:, W], rec, mat, h0, None if starts is None else starts[:, W].contiguous())
            guess = _back(cell, *early, emitted[:, W].contiguous(), kept[:, W].contiguous(), d_emitted[:, W].contiguous(), zero, 0)[3]
            lefts = part.gather(guess, "adjoints").transpose(0, 1)
            right = torch.cat([lefts[:, 1:], torch.zeros_like(lefts[:, :1])], 1)
            for correction in range(part.size):
                d_final = right[:, part.rank].contiguous()
                d_pre, d_rec, d_mat, d_h0, size = _back(cell, pre, rec, mat, h0, starts, emitted, kept, d_emitted, d_final, part.learner)
                part.count("adjoints")
                if correction == part.size - 1:
                    break
                lefts, sizes, products = _between(part, d_h0, size, P, "checks of adjoints")
                back = products.flip(1).transpose(2, 3)
                new = corrected(lefts.flip(1), back, right.flip(1)).flip(1)
                if share((new - right)[:, :-1], sizes[:, 1:]) <= TOLERANCE[pre.dtype]:
                    break
                right = new
        return d_pre, d_rec.to(rec.dtype), d_mat.to(mat.dtype), None, None, None


def over_ranks(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, mat_EKGK: Tensor, starts_BT: Tensor | None, part: Part) -> Tensor:
    """The emitted states (B, T, D) of this rank's part; differentiable in pre, rec and mat, whose gradients are those of this part alone.

    Arguments as of `dense_rnn`; starts with the part before considered. The first part starts from zero. Collective: all ranks call it, and
    its backward pass, in one order.
    """
    emitted: Tensor = _Over.apply(pre_BTPD, rec_RD, mat_EKGK, starts_BT, cell.key, part)
    return emitted
