"""A slice of time, one on each rank of a process group, and what the ranks exchange over its borders.

A mixer finds the `Slice` of its rank in `self.slice` (models/parallel.py puts it there) and asks it for what lies before its own tokens. Here
are the collectives only, differentiable and plain; what a mixer makes of them is its own. Every method is called by all ranks in one order.
Legend: B batch, T time of a slice, N ranks, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.segments import Documents, document_starts

untraced = torch._disable_dynamo  # torch.compiler.disable, but the compiler is loaded with the first call, not here
# bytes in all that are sent to every rank rather than to a neighbour: sending and receiving costs the host ten times a gather
SMALL = 1 << 20


@dataclass
class Traffic:
    """What this process received from others, in bytes by purpose, and what its nonlinear solves needed, since `clear`."""

    received: Counter[str] = field(default_factory=Counter)
    solves: int = 0
    corrections: int = 0
    adjoints: int = 0  # of those that are solved more than once

    def clear(self) -> None:
        self.received.clear()
        self.solves = self.corrections = self.adjoints = 0


traffic = Traffic()


class _Exchange(torch.autograd.Function):
    """there: a linear map of this rank's tensor over all ranks; back: its adjoint, for the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(value.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None


class _AdjointFromRight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        final: Tensor,
        slice_: Slice,
        local: Callable[..., tuple[Tensor, Tensor]],
        reach: Callable[[Tensor, Tensor], Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.slice, ctx.local, ctx.reach = slice_, local, reach
        ctx.save_for_backward(*tensors)
        ctx.final_dtype = final.dtype
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        slice_, tensors = ctx.slice, ctx.saved_tensors
        with torch.autocast(gradients[0].device.type, enabled=False):
            start, through = ctx.local(gradients[0], *tensors)
        starts, throughs = slice_.gather_two(start, through, "adjoints")
        final = torch.zeros_like(start)
        for n in range(slice_.size - 1, slice_.rank, -1):
            final = starts[n] + ctx.reach(throughs[n], final)
        return gradients[0], final.to(ctx.final_dtype), None, None, None, *(None for _ in tensors)


class _FromLeft(torch.autograd.Function):
    """The state that the rank before hands over, zeros on the first; its gradient goes there. anchor: makes a node of this, whatever needs gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, empty: Tensor, slice_: Slice, purpose: str) -> Tensor:
        ctx.slice, ctx.purpose = slice_, purpose
        return slice_.receive(empty, slice_.rank - 1, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        ctx.slice.send(gradients[0], ctx.slice.rank - 1)
        return None, None, None, None


class _ToRight(torch.autograd.Function):
    """The outputs as they are, when the final state is handed to the rank behind; its gradient comes from there."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, final: Tensor, slice_: Slice, purpose: str) -> Tensor:
        ctx.slice, ctx.purpose, ctx.like = slice_, purpose, (final.shape, final.dtype)
        slice_.send(final, slice_.rank + 1)
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (shape, dtype), outputs = ctx.like, gradients[0]
        return outputs, ctx.slice.receive(outputs.new_empty(shape, dtype=dtype), ctx.slice.rank + 1, f"{ctx.purpose} back"), None, None


class Slice:
    """This rank's slice of time among those of `group` (None: all ranks), in the order of the ranks; slices are equally long.

    Its methods are collective: all ranks of the group call them in the same order, also in the backward pass. So every rank must keep what
    comes of a differentiable one in its graph, even if it has no use for it: multiply by zero or cut, but do not branch on the rank.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        # The segments of a slice and what was exchanged of them, once for all layers, which are given the same tensor.
        self._documents: tuple[Tensor, Documents] | None = None
        self._starts: tuple[Tensor, Tensor | None] | None = None

    # Without a graph

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

    def swap(self, value: Tensor, purpose: str) -> Tensor:
        """(N, ...): part n of every rank goes to rank n; the parts that come are stacked in the order of their ranks. Without a graph."""
        value = value.contiguous()
        out = torch.empty_like(value)
        dist.all_to_all_single(out, value, group=self.group)
        traffic.received[purpose] += value.nbytes * (self.size - 1) // self.size
        return out

    def pass_on(self, value: Tensor, by: int, purpose: str) -> Tensor:
        """What the rank `by` places before holds; zeros where there is none. Without a graph."""
        if value.nbytes * self.size <= SMALL:
            parts, source = self.gather(value, purpose), self.rank - by
            return parts[source] if 0 <= source < self.size else torch.zeros_like(parts[0])
        value, out = value.contiguous(), torch.zeros_like(value, memory_format=torch.contiguous_format)
        self._exchange((dist.isend, value, self.rank + by), (dist.irecv, out, self.rank - by))
        traffic.received[purpose] += out.nbytes if 0 <= self.rank - by < self.size else 0
        return out

    def send(self, value: Tensor, to: int) -> None:
        """To that rank of the group, if there is one, which calls `receive`."""
        self._exchange((dist.isend, value.contiguous(), to))

    def receive(self, empty: Tensor, source: int, purpose: str) -> Tensor:
        """What that rank sends, written into `empty`; zeros if there is no such rank."""
        if not 0 <= source < self.size:
            return empty.zero_()
        self._exchange((dist.irecv, empty, source))
        traffic.received[purpose] += empty.nbytes
        return empty

    def _exchange(self, *wanted: tuple[Any, Tensor, int]) -> None:
        """(operation, tensor, rank) at once, of ranks that are there."""
        work = []
        for operation, tensor, peer in wanted:
            if 0 <= peer < self.size:
                there = peer if self.group is None else dist.get_global_rank(self.group, peer)
                work.append(dist.P2POp(operation, tensor, there, self.group))
        for request in dist.batch_isend_irecv(work) if work else ():
            request.wait()

    # Differentiable

    @untraced
    def shifted(self, value: Tensor, purpose: str) -> Tensor:
        """The tensor of the rank before (zeros on the first); its gradient goes the other way."""
        return _Exchange.apply(value, lambda v: self.pass_on(v, 1, purpose), lambda g: self.pass_on(g, -1, purpose))

    @untraced
    def swapped(self, value: Tensor, purpose: str) -> Tensor:
        """(N, ...): `swap`, which is its own adjoint."""
        return _Exchange.apply(value, lambda v: self.swap(v, purpose), lambda g: self.swap(g, purpose))

    @untraced
    def gathered(self, value: Tensor, purpose: str) -> Tensor:
        """(N, ...): the tensors of all ranks; the gradient is what all ranks ask of this rank's."""
        return _Exchange.apply(value, lambda v: self.gather(v, purpose), lambda g: self.swap(g, purpose).sum(0))

    @untraced
    def carried(self, end: Tensor, through: Tensor) -> Tensor:
        """The state that an elementwise linear recurrence, h_t = a_t h_{t-1} + b_t, has before this slice's first token.

        end: the state after the slice if it had begun with zero; through: the product of the slice's a, of the same shape. Nothing comes
        through a zero, as where a document starts, not even what is not a number.
        """
        both = self.gathered(torch.stack([end, through]), "states")
        start = both[:0].sum(0)[0]  # zeros that depend on the exchange, so that the first rank's graph holds it too
        for end_n, through_n in both[: self.rank]:
            start = end_n + through_n * torch.where(through_n == 0, 0.0, start)
        return start

    @untraced
    def with_adjoint_from_right(
        self,
        outputs: Tensor,
        final: Tensor,
        local: Callable[..., tuple[Tensor, Tensor]],
        reach: Callable[[Tensor, Tensor], Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        """The outputs of a slice's recurrence as they are. In the backward pass its final state gets the adjoint that the slices after it
        ask for, so that the ordinary backward runs once, with the right end.

        local(d_outputs, *tensors): (the adjoint of the slice's start if nothing came to its end, what is left at the start of an adjoint at
        the end); reach(what is left, adjoint) applies it. The adjoint is linear, so these two from every rank are enough, and no gradient of
        the start itself is needed.
        """
        return _AdjointFromRight.apply(outputs, final, self, local, reach, *tensors)

    @untraced
    def in_turn(self, run: Callable[[Tensor], tuple[Tensor, Tensor]], empty: Tensor, purpose: str) -> Tensor:
        """The outputs of run(the state before this slice) -> (outputs, final state), on one rank after the other, and backwards from the last to the
        first: for a recurrence that can be walked in order alone. empty: memory for a state."""
        anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
        outputs, final = run(_FromLeft.apply(anchor, empty, self, purpose))
        handed: Tensor = _ToRight.apply(outputs, final, self, purpose)
        return handed

    # Segments and convolutions, alike in all mixers

    @untraced
    def starts(self, segment_ids: Tensor | None) -> Tensor | None:
        """`document_starts` of this slice, the slice before it considered."""
        if segment_ids is None:
            return None
        if self._starts is None or self._starts[0] is not segment_ids:
            before = self.pass_on(segment_ids[:, -1], 1, "segments")
            self._starts = segment_ids, document_starts(segment_ids, before if self.rank else segment_ids[:, 0])
        return self._starts[1]

    @untraced
    def documents(self, segment_ids: Tensor | None) -> Documents | None:
        """The documents of all slices, (B, N T)."""
        if segment_ids is None:
            return None
        if self._documents is None or self._documents[0] is not segment_ids:
            self._documents = segment_ids, Documents(self.gather(segment_ids, "segments").transpose(0, 1).flatten(1))
        return self._documents[1]

    @untraced
    def halo(self, x_BTD: Tensor, width: int, segment_ids: Tensor | None) -> Tensor:
        """The last width-1 inputs of the slice before, zero where they belong to an earlier document than its last token."""
        T = x_BTD.shape[1]
        if T < width - 1:
            raise ValueError(f"A slice of {T} tokens is shorter than the {width - 1} a convolution looks back; use fewer ranks.")
        tail = x_BTD[:, T - width + 1 :]
        if segment_ids is not None:
            tail = torch.where((segment_ids[:, T - width + 1 :] == segment_ids[:, -1:])[..., None], tail, 0.0)
        return self.shifted(tail, "halo")
