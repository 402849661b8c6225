"""Sequence parallelism: time cut into equal slices, one on each rank of a process group.

`with split(model, group):` gives every mixer a `Slice`, which its forward asks for what lies before its own tokens. Recurrences exchange
border values only, whatever the length: nonlinear cells their end states and the products of their Jacobians (multiple shooting with one
slice a rank, certified at the borders), Mamba-2 its states and decays, convolutions their last inputs. Attention gathers keys and values.
Gradients of parameters are those of this rank's slice: sum them over the group.

Legend: B batch, T time of a slice, N ranks, D width, S states of a cell, H heads, P head width, M state width of Mamba-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.parallel_rnn import parallel_rnn, reference
from models.contract import SequenceMixer, document_starts

traffic = {"bytes": 0}  # received by this process since it was last set to zero


def _all(value: Tensor, group: Any) -> Tensor:
    """(N, ...): the tensors of all ranks, without a graph."""
    value = value.detach().contiguous()
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value, group=group)
    traffic["bytes"] += value.nbytes * (len(parts) - 1)
    return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """`_all` with a gradient: what all ranks ask of this rank's value. Every rank must keep the result in its graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all(value, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        traffic["bytes"] += total.nbytes
        return total[dist.get_rank(ctx.group)], None


class Slice:
    """This rank's slice of time among those of `group` (None: all ranks), in the order of the ranks; slices are equally long.

    Its methods are collective: all ranks of the group call them in the same order, also in the backward pass.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    @torch.compiler.disable
    def starts(self, segment_ids: Tensor | None) -> Tensor | None:
        """document_starts of this slice, the slice before it considered."""
        if segment_ids is None:
            return None
        last_NB = _all(segment_ids[:, -1], self.group)
        return document_starts(segment_ids, last_NB[self.rank - 1] if self.rank else segment_ids[:, 0])

    @torch.compiler.disable
    def halo(self, x_BTD: Tensor, width: int, segment_ids: Tensor | None) -> Tensor:
        """The last width-1 inputs of the slice before, zero where they belong to an earlier document than its last token."""
        T = x_BTD.shape[1]
        if T < width - 1:
            raise ValueError(f"A slice of {T} tokens is shorter than the {width - 1} a convolution looks back; use fewer ranks.")
        tail = x_BTD[:, T - width + 1 :]
        if segment_ids is not None:
            tail = tail * (segment_ids[:, T - width + 1 :] == segment_ids[:, -1:])[..., None]
        gathered = _Gather.apply(tail, self.group)
        return gathered[self.rank - 1] if self.rank else gathered[0] * 0

    @torch.compiler.disable
    def states(self, cell: Any, pre: Tensor, rec: Tensor, starts: Tensor | None) -> Tensor:
        """States (B, T, S, D) of a nonlinear cell; arguments as of `parallel_rnn`."""
        with torch.autocast(pre.device.type, enabled=False):
            return _Across.apply(cell, pre, rec, starts, self.group)

    @torch.compiler.disable
    def carried(self, end_BHPM: Tensor, decay_BTH: Tensor, C_BTGM: Tensor, starts: Tensor | None) -> Tensor:
        """What the state before the slice adds to Mamba-2's outputs (B, T, H, P), given the slice's own end from an empty state and the
        logarithm of each step's decay."""
        left_BTH = torch.exp(decay_BTH.cumsum(1))  # what is left of the state before the slice
        if starts is not None:
            left_BTH = left_BTH * (starts.cumsum(1) == 0)[..., None]
        both = _Gather.apply(torch.cat([end_BHPM.flatten(2), left_BTH[:, -1, :, None]], -1), self.group)
        before = [both[0, ..., :-1] * 0]
        for n in range(self.size - 1):
            before.append(both[n, ..., -1:] * before[-1] + both[n, ..., :-1])
        h0_BHPM = torch.stack(before)[self.rank].view_as(end_BHPM)
        C_BTHM = C_BTGM.to(end_BHPM.dtype).repeat_interleave(end_BHPM.shape[1] // C_BTGM.shape[2], 2)
        with torch.autocast(end_BHPM.device.type, enabled=False):
            return torch.einsum("bthn,bhpn->bthp", C_BTHM, h0_BHPM) * left_BTH[..., None]

    @torch.compiler.disable
    def keys(self, k_BGTK: Tensor, v_BGTK: Tensor, segment_ids: Tensor | None, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and segments of this slice and of what it sees before it."""
        both = _Gather.apply(torch.stack([k_BGTK, v_BGTK.to(k_BGTK.dtype)]), self.group)[: self.rank + 1]
        k, v = (torch.cat(list(both[:, i]), 2) for i in (0, 1))
        segments = None if segment_ids is None else torch.cat(list(_all(segment_ids, self.group)[: self.rank + 1]), 1)
        if window:
            keep = k_BGTK.shape[2] + window - 1
            k, v, segments = k[:, :, -keep:], v[:, :, -keep:], None if segments is None else segments[:, -keep:]
        return k, v, segments


class _Across(torch.autograd.Function):
    """States (B, T, S, D) of this rank's slice of one long recurrence."""

    @staticmethod
    def forward(ctx: Any, cell: Any, pre: Tensor, rec: Tensor, starts: Tensor | None, group: Any) -> Tensor:
        rank, N = dist.get_rank(group), dist.get_world_size(group)
        dtype = reference.compute_dtype(pre)
        start = pre.new_zeros(pre.shape[0], N, len(cell.state), pre.shape[-1], dtype=dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        for correction in range(N):
            h0 = start[:, rank].contiguous()
            states, final = parallel_rnn(cell, pre, rec, h0, starts)
            J = _jacobians(cell, pre, rec, h0, starts, states)
            both = _all(torch.cat([final.to(dtype)[:, None], reference.product(J[:, None])[:, 0]], 1), group).transpose(0, 1)
            end, P = both[:, :, 0], both[:, :, 1:]
            gap = ((start[:, 1:] - end[:, :-1]).abs() / (1 + end[:, :-1].abs())).nan_to_num(nan=torch.inf)
            if correction == N - 1 or not gap.numel() or float(gap.max()) <= tolerance:
                break  # all ranks hold the same numbers, so all stop together; N - 1 corrections make every slice exact
            start = reference.corrected(end, P, start)
        ctx.save_for_backward(pre, rec, h0, states, *(() if starts is None else (starts,)))
        ctx.cell, ctx.group = cell, group
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        pre, rec, h0, states, *rest = ctx.saved_tensors
        starts, dtype = rest[0] if rest else None, h0.dtype
        rank, N = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        J = _jacobians(ctx.cell, pre, rec, h0, starts, states)
        d_states = gradients[0].to(dtype)
        _, local = reference.adjoints(J, d_states, torch.zeros_like(h0), None)
        both = _all(torch.cat([local[:, None], reference.product(J[:, None])[:, 0]], 1), ctx.group)
        carried = torch.zeros_like(h0)
        for n in range(N - 1, rank, -1):
            carried = both[n, :, 0] + (both[n, :, 1:] * carried[:, :, None]).sum(1)
        w, x = rec.to(dtype), pre.to(dtype)
        d_pre, d_rec, _ = reference.linear_backward(ctx.cell, x, w, h0, starts, states.to(dtype), d_states, carried)
        return None, d_pre.to(pre.dtype), d_rec.to(rec.dtype), None, None


def _jacobians(cell: Any, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, states: Tensor) -> Tensor:
    dtype = h0.dtype
    J = reference.jacobian(cell, pre.to(dtype), rec.to(dtype), reference.previous(states.to(dtype), h0, starts))
    return J if starts is None else J * (~starts[:, :, None, None, None]).to(dtype)


@contextmanager
def split(model: nn.Module, group: Any = None) -> Iterator[None]:
    """Inside, calls of `model` without a state are slices of time: rank n of `group` (None: all ranks) holds the n-th.

    The backward pass belongs inside too. Raises ValueError for a mixer that cannot be split.
    """
    parts = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    reasons = [reason for part in parts if (reason := part.why_whole())]
    if reasons:
        raise ValueError(f"Time cannot be split over ranks: {reasons[0]}.")
    own = Slice(group)
    try:
        for part in parts:
            part.slice = own
        yield
    finally:
        for part in parts:
            part.slice = None
