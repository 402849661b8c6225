"""Sequence parallelism: time cut into equal slices, one on each rank of a process group.

`with split(model, group):` gives every mixer a `Slice`, which its forward asks for what lies before its own tokens. Recurrences exchange
border values only, whatever the length, and each rank then runs its ordinary kernel once with the right start; in the backward pass the
adjoint of a slice's final state is fetched from the right in the same way (`_FromRight`) and the ordinary backward runs once with it.
Attention swaps time for heads (Ulysses) where the heads divide, needs a halo only under a window, and else gathers keys and values.
Gradients of parameters are those of this rank's slice: sum them over the group.

Legend: B batch, T time of a slice, N ranks, D width, S states of a cell, H heads, G key/value heads, K head width, P head width and
M state width of Mamba-2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.parallel_rnn import adjoint, parallel_rnn, reference, solved, with_bias
from kernels.parallel_rnn.cell import biased
from kernels.ssd import border, ssd
from models.contract import SequenceMixer, document_starts

untraced = torch._disable_dynamo  # torch.compiler.disable, but the compiler is loaded with the first call, not here
# bytes in all that are sent to every rank rather than to a neighbour: sending and receiving costs the host ten times a gather
SMALL = 1 << 20
BURN_IN = 512  # last steps of a slice, walked from zero, whose end is the first guess of the next slice's start


@dataclass
class Traffic:
    """What this process received from others, in bytes by purpose, and what its nonlinear solves needed, since `clear`."""

    received: Counter[str] = field(default_factory=Counter)
    solves: int = 0
    corrections: int = 0

    def clear(self) -> None:
        self.received.clear()
        self.solves = self.corrections = 0


traffic = Traffic()


class _Shift(torch.autograd.Function):
    """The tensor of the rank before (zeros on the first); its gradient goes the other way. Every rank must keep the result in its graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, own: Slice, purpose: str) -> Tensor:
        ctx.own, ctx.purpose = own, purpose
        return own.pass_on(value.detach(), 1, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.own.pass_on(gradients[0], -1, ctx.purpose), None, None


class _Swap(torch.autograd.Function):
    """(N, ...): part n of every rank goes to rank n; the parts that come are stacked in the order of their ranks. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, own: Slice) -> Tensor:
        ctx.own = own
        return own.swap(value.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.own.swap(gradients[0]), None


class _Gather(torch.autograd.Function):
    """(N, ...): the tensors of all ranks; the gradient is what all ranks ask of this rank's. Every rank must keep the result in its graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, own: Slice, purpose: str) -> Tensor:
        ctx.own, ctx.purpose = own, purpose
        return own.gather(value.detach(), purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.own.swap(gradients[0], ctx.purpose).sum(0), None, None


class _FromRight(torch.autograd.Function):
    """The outputs of a slice's recurrence as they are. In the backward pass, the adjoint that its final state gets from the slices after it.

    local(d_outputs, *tensors) tells (adjoint of the slice's start if nothing came to its end, what is left at the start of an adjoint at
    the end); the adjoint is linear, so these two from every rank are enough, and no gradient of the start itself is needed.
    """

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, final: Tensor, own: Slice, local: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor | None
    ) -> Tensor:
        ctx.own, ctx.local = own, local
        ctx.save_for_backward(*tensors)
        ctx.like = final.dtype
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        own, tensors = ctx.own, ctx.saved_tensors
        with torch.autocast(gradients[0].device.type, enabled=False):
            start, through = ctx.local(gradients[0], *tensors)
        starts, throughs = own.gather_two(start, through, "adjoints")
        final = torch.zeros_like(start)
        for n in range(own.size - 1, own.rank, -1):
            final = starts[n] + _reach(throughs[n], final)
        return gradients[0], final.to(ctx.like), None, None, *(None for _ in tensors)


def _reach(through: Tensor, value: Tensor) -> Tensor:
    """through applied to value: Jacobians (B, S, S, D) to (B, S, D), or decays (B, H) to (B, H, P, M). Nothing comes through zeros, as where
    a document starts, not even what is not a number."""
    if value.ndim == 3:
        return torch.where(through == 0, torch.zeros_like(through), through * value[:, None]).sum(2)
    through = through[..., None, None]
    return torch.where(through == 0, torch.zeros_like(value), through * value)


class Slice:
    """This rank's slice of time among those of `group` (None: all ranks), in the order of the ranks; slices are equally long.

    Its methods are collective: all ranks of the group call them in the same order, also in the backward pass.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self._segments: tuple[Tensor, Tensor] | None = None  # of a slice, and what was found of them: all layers ask the same
        self._starts: tuple[Tensor, Tensor | None] | None = None

    # What crosses the borders

    def gather(self, value: Tensor, purpose: str) -> Tensor:
        """(N, ...): the tensors of all ranks, without a graph."""
        value = value.contiguous()
        parts = value.new_empty(self.size, *value.shape)
        dist.all_gather_into_tensor(parts.view(-1), value.view(-1), group=self.group)
        traffic.received[purpose] += value.nbytes * (self.size - 1)
        return parts

    def gather_two(self, a: Tensor, b: Tensor, purpose: str) -> tuple[Tensor, Tensor]:
        """`gather` of two tensors of one type in one message."""
        both = self.gather(torch.cat([a.flatten(), b.flatten()]), purpose)
        return both[:, : a.numel()].view(-1, *a.shape), both[:, a.numel() :].view(-1, *b.shape)

    def swap(self, value: Tensor, purpose: str = "attention") -> Tensor:
        value = value.contiguous()
        out = torch.empty_like(value)
        dist.all_to_all_single(out, value, group=self.group)
        traffic.received[purpose] += value.nbytes * (self.size - 1) // self.size
        return out

    def pass_on(self, value: Tensor, by: int, purpose: str) -> Tensor:
        """What the rank `by` places before holds; zeros where there is none."""
        if value.nbytes * self.size <= SMALL:
            parts, source = self.gather(value, purpose), self.rank - by
            return parts[source] if 0 <= source < self.size else torch.zeros_like(parts[0])
        value, out = value.contiguous(), torch.zeros_like(value, memory_format=torch.contiguous_format)
        to, source = self.rank + by, self.rank - by
        work = []
        for operation, tensor, peer in ((dist.isend, value, to), (dist.irecv, out, source)):
            if 0 <= peer < self.size:
                work.append(
                    dist.P2POp(operation, tensor, peer if self.group is None else dist.get_global_rank(self.group, peer), self.group)
                )
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()
        traffic.received[purpose] += out.nbytes if 0 <= source < self.size else 0
        return out

    # What mixers ask for

    @untraced
    def starts(self, segment_ids: Tensor | None) -> Tensor | None:
        """document_starts of this slice, the slice before it considered."""
        if segment_ids is None:
            return None
        if self._starts is None or self._starts[0] is not segment_ids:
            before = self.pass_on(segment_ids[:, -1], 1, "segments")
            self._starts = segment_ids, document_starts(segment_ids, before if self.rank else segment_ids[:, 0])
        return self._starts[1]

    @untraced
    def all_segments(self, segment_ids: Tensor | None) -> Tensor | None:
        """(B, N T): the segments of all slices."""
        if segment_ids is None:
            return None
        if self._segments is None or self._segments[0] is not segment_ids:
            self._segments = segment_ids, self.gather(segment_ids, "segments").transpose(0, 1).flatten(1)
        return self._segments[1]

    @untraced
    def halo(self, x_BTD: Tensor, width: int, segment_ids: Tensor | None) -> Tensor:
        """The last width-1 inputs of the slice before, zero where they belong to an earlier document than its last token."""
        T = x_BTD.shape[1]
        if T < width - 1:
            raise ValueError(f"A slice of {T} tokens is shorter than the {width - 1} a convolution looks back; use fewer ranks.")
        tail = x_BTD[:, T - width + 1 :]
        if segment_ids is not None:
            tail = torch.where((segment_ids[:, T - width + 1 :] == segment_ids[:, -1:])[..., None], tail, 0.0)
        return _Shift.apply(tail, self, "halo")

    @untraced
    def states(self, cell: Any, pre: Tensor, rec: Tensor, starts: Tensor | None, bias: Tensor) -> Tensor:
        """Emitted states (B, T, D) of a nonlinear cell; arguments as of `parallel_rnn`.

        Multiple shooting with one slice a rank: solve from a guessed start; where a correction of the starts by the slices' Jacobian
        products is more than the tolerance of what earlier states left there (`reference.share`), solve again. N - 1 corrections make every slice exact,
        whatever the Jacobians are.
        """
        cell, rec = biased(cell), with_bias(rec, bias)
        with torch.autocast(pre.device.type, enabled=False):
            start = self._guess(cell, pre, rec, starts)
            for correction in range(self.size):
                h0 = start[:, self.rank].contiguous()
                emitted, kept, final = solved(cell, pre, rec, h0, starts)
                traffic.solves += 1
                if correction == self.size - 1:
                    break
                _, product, left = adjoint(cell, pre, rec, h0, starts, (emitted, kept), None)
                end = final.detach()
                own = torch.cat([end[:, None], torch.maximum(left, end.abs())[:, None], product], 1)
                ends, lefts, products = self.gather(own, "checks").transpose(0, 1).split([1, 1, product.shape[1]], 2)
                new = reference.corrected(ends[:, :, 0], products, start)
                change = reference.share((new - start)[:, 1:], reference.remainders(products, lefts[:, :, 0])[:, :-1])
                if change <= reference.tolerance(cell, pre.dtype):  # all ranks hold the same numbers, so all stop together
                    break
                traffic.corrections += 1
                start = new
            return _FromRight.apply(emitted, final, self, _OfCell(cell), pre, rec, h0, starts, emitted, kept)

    @torch.no_grad()
    def _guess(self, cell: Any, pre: Tensor, rec: Tensor, starts: Tensor | None) -> Tensor:
        """First guess (B, N, S, D) of all slices' starts: zero, then each slice's end if its last steps alone made it."""
        first = max(0, pre.shape[1] - BURN_IN)
        _, end = parallel_rnn(cell, pre[:, first:], rec, None, None if starts is None else starts[:, first:], emitted=True)
        ends = self.gather(end, "states").transpose(0, 1)
        return torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)

    @untraced
    def scan(
        self, x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGM: Tensor, C_BTGM: Tensor, D_H: Tensor, starts: Tensor | None, chunk: int
    ) -> Tensor:
        """Mamba-2's outputs (B, T, H, P); arguments as of `ssd`. The end of the slice from an empty state comes from one matrix product, so
        that the scan runs once, with the right start."""
        with torch.autocast(x_BTHP.device.type, enabled=False):
            with torch.no_grad():
                end, through = border.end_state(x_BTHP, dt_BTH, A_H, B_BTGM, starts)
                ends, throughs = self.gather_two(end, through, "states")
                h0 = torch.zeros_like(end)
                for n in range(self.rank):
                    h0 = ends[n] + _reach(throughs[n], h0)
            y, final = ssd(x_BTHP, dt_BTH, A_H, B_BTGM, C_BTGM, h0, starts, chunk=chunk, D_H=D_H)
            return _FromRight.apply(y, final, self, border.start_adjoint, dt_BTH, A_H, C_BTGM, starts)

    def swaps(self, H: int, G: int) -> bool:
        """Whether the heads can be dealt out to the ranks."""
        return H % self.size == 0 and (G % self.size == 0 or self.size % G == 0)

    @untraced
    def to_heads(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All of the time of this rank's share of the heads (DeepSpeed-Ulysses, arXiv 2309.14509), in one message; key/value heads that are
        fewer than the ranks are sent to several."""
        N, dtype = self.size, q_BHTK.dtype
        k, v = (t.to(dtype).repeat_interleave(max(1, N // t.shape[1]), 1) for t in (k_BGTK, v_BGTK))
        parts = torch.cat([t.unflatten(1, (N, -1)).transpose(0, 1) for t in (q_BHTK, k, v)], 2)  # (N, B, heads, T, K)
        whole = _Swap.apply(parts, self).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return whole.split([q_BHTK.shape[1] // N, k.shape[1] // N, v.shape[1] // N], 1)

    @untraced
    def to_time(self, y_BHTK: Tensor) -> Tensor:
        """Back from all of the time of some heads to this slice of all heads."""
        parts = y_BHTK.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)
        return _Swap.apply(parts, self).transpose(0, 1).flatten(1, 2)

    @untraced
    def keys(self, k_BGTK: Tensor, v_BGTK: Tensor, segment_ids: Tensor | None, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and segments of this slice and of what it sees before it: a halo if the window allows, else all slices before."""
        both, back = torch.stack([k_BGTK, v_BGTK.to(k_BGTK.dtype)]), window - 1
        segments = self.all_segments(segment_ids)
        T = k_BGTK.shape[2]
        if window and back <= T:
            both = torch.cat([_Shift.apply(both[..., T - back :, :], self, "attention"), both], 3)
            both = both if self.rank else both[..., back:, :]  # a cut, not a way around, so that the first rank's graph holds the exchange
        else:
            both = torch.cat(list(_Gather.apply(both, self, "attention")[: self.rank + 1]), 3)
            both = both[..., -(T + back) :, :] if window else both
        if segments is not None:
            last = (self.rank + 1) * T
            segments = segments[:, last - both.shape[3] : last]
        return both[0], both[1], segments


@dataclass(frozen=True)
class _OfCell:
    """The local adjoint of a cell's slice, as _FromRight calls it."""

    cell: Any

    def __call__(
        self, d_emitted: Tensor, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        start, product, *_ = adjoint(self.cell, pre, rec, h0, starts, (emitted, kept), d_emitted)
        product = product if starts is None else reference.zeroed(product, starts.any(1)[:, None, None, None])
        return start, product.transpose(1, 2)


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
