"""ZeRO-1 and 2 whose gradients are reduced once a step, behind the backward pass: so that the pass may be a CUDA graph.

DeepSpeed reduces in hooks of each parameter while the backward pass runs. That costs the host more than launching the pass itself, a graph cannot
hold it, and each bucket is all-reduced though a rank keeps a part of it. Here the hooks are off; when all gradients of a step are there, they are
laid out as the ranks own them, a bucket at a time, and scattered. What DeepSpeed finds is what its own reduction would have left (a partition that
is already flat, as its compiler's passes leave it), and its step goes on from there: norm, clipping, Adam, the gathering of weights. Sums are taken
in the dtypes that DeepSpeed would take, see `policy.reduction`. The price is memory: gradients are whole until they are reduced, under ZeRO-2 too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.zero import norms, patches


@dataclass(frozen=True)
class Run:
    """Elements first .. first+count-1 of the flattened `parameter`, which lie in the part of `rank` from `place` on, and in the columns of a bucket
    from `column` on."""

    parameter: nn.Parameter
    first: int
    count: int
    rank: int
    place: int
    column: int


def buckets(parameters: list[nn.Parameter], offsets: list[int], part: int, ranks: int, columns: int) -> Iterator[tuple[int, list[Run]]]:
    """(columns, runs) of each bucket, a matrix of `ranks` rows whose row r is summed for rank r. offsets: of the parameters in the flat group that is
    cut into parts of `part` elements."""
    filled = [0] * ranks  # columns of each rank's row, over all buckets
    made: dict[int, list[Run]] = {}
    for parameter, offset in zip(parameters, offsets):
        at, end = offset, offset + parameter.numel()
        while at < end:
            rank = at // part
            number, column = divmod(filled[rank], columns)
            count = min(end - at, (rank + 1) * part - at, columns - column)
            made.setdefault(number, []).append(Run(parameter, at - offset, count, rank, at - rank * part, column))
            filled[rank] += count
            at += count
    for number in sorted(made):
        yield max(run.column + run.count for run in made[number]), made[number]


class Partition(list[Tensor]):
    """This rank's gradients of a group, a piece for each parameter, and all of them as one tensor: then DeepSpeed does not put them together. norm: of
    the group over all ranks."""

    norm: Tensor | None = None

    def __init__(self, pieces: list[Tensor], flat_partition: Tensor) -> None:
        super().__init__(pieces)
        self.flat_partition = flat_partition


Bucket = tuple[torch.dtype, int, list[Run]]  # the dtype of its sums, its columns and what lies in it


def by_dtype(optimizer: Any, parameters: list[nn.Parameter]) -> dict[torch.dtype, list[int]]:
    """Numbers of the parameters whose gradients are summed in each dtype: a bucket is of one."""
    numbers: dict[torch.dtype, list[int]] = {}
    for number, parameter in enumerate(parameters):
        numbers.setdefault(optimizer.get_param_comm_dtype(parameter), []).append(number)
    return numbers


class OnItsWay(Protocol):
    """What was begun, and is put where it belongs by `place`."""

    def place(self) -> None: ...


def in_turn(begun: Iterable[OnItsWay]) -> None:
    """Puts each where it belongs once the one after it has begun."""
    before: OnItsWay | None = None
    for following in begun:
        if before is not None:
            before.place()
        before = following
    if before is not None:
        before.place()


def leave(optimizer: Any, reduced: list[Partition], groups: Iterable[Iterable[nn.Parameter]]) -> None:
    """Leaves this rank's gradients of each group to DeepSpeed's step, with their norms, and lets go of the whole ones. Collective."""
    total = torch.stack([norms.squares([p.flat_partition] if p.flat_partition.is_cuda else p, p.flat_partition.device) for p in reduced])
    dist.all_reduce(total)
    for i, (partition, norm) in enumerate(zip(reduced, norms.root(total))):
        partition.norm = norm
        optimizer.averaged_gradients[i] = partition
    for parameters in groups:
        for parameter in parameters:
            parameter.grad = None


class AtOnce:
    """Reduces the gradients of a ZeRO-1 or 2 optimizer of DeepSpeed; elements: numbers in a bucket."""

    def __init__(self, optimizer: Any, elements: int) -> None:
        self.optimizer = optimizer
        self.plans: list[list[Bucket]] = []  # of each group
        self.pieces: list[list[tuple[int, int]]] = []  # of each group: where this rank's part of each parameter begins and ends
        self.gaps: list[list[tuple[int, int]]] = []  # and what lies between them, by which DeepSpeed aligns
        for i, parameters in enumerate(optimizer.round_robin_bit16_groups):
            group, part = optimizer.real_dp_process_group[i], int(optimizer.partition_size[i])
            begin = optimizer.bit16_groups_flat[i].data_ptr()
            rank, ranks = dist.get_rank(group), dist.get_world_size(group)
            offsets = [(p.data_ptr() - begin) // p.element_size() for p in parameters]
            columns = max(1, elements // ranks)
            self.plans.append(
                [
                    (dtype, *bucket)
                    for dtype, numbers in by_dtype(optimizer, parameters).items()
                    for bucket in buckets([parameters[n] for n in numbers], [offsets[n] for n in numbers], part, ranks, columns)
                ]
            )
            ends = [(max(o - rank * part, 0), min(o + p.numel() - rank * part, part)) for p, o in zip(parameters, offsets)]
            self.pieces.append([(first, last) for first, last in ends if first < last])
            covered = sorted(self.pieces[-1])
            between = zip([0, *(last for _, last in covered)], [*(first for first, _ in covered), part])
            self.gaps.append([(last, first) for last, first in between if last < first])
        patches.hook_gradients(optimizer, False)
        patches.let_accumulators_go(optimizer)

    def give_up(self) -> None:
        """From the next pass on DeepSpeed reduces by itself again."""
        patches.hook_gradients(self.optimizer, True)

    @torch.no_grad()
    def reduce(self) -> None:
        """Averages the gradients that lie in the parameters over ranks and leaves this rank's part to DeepSpeed's step, with its norm; the others are
        gone. Nothing waits for the device. One bucket is filled while the one before it is sent."""
        optimizer, reduced = self.optimizer, list[Partition]()
        for i, plan in enumerate(self.plans):
            group = optimizer.real_dp_process_group[i]
            flat = torch.empty(int(optimizer.partition_size[i]), device=optimizer.bit16_groups_flat[i].device)
            for first, last in self.gaps[i]:
                flat[first:last].zero_()
            in_turn(Sent(group, *bucket, flat) for bucket in plan)
            reduced.append(Partition([flat[first:last] for first, last in self.pieces[i]], flat))
        leave(optimizer, reduced, optimizer.bit16_groups)


class Sent:
    """A bucket on its way to the ranks that own its rows."""

    def __init__(self, group: Any, dtype: torch.dtype, columns: int, runs: list[Run], flat: Tensor) -> None:
        self.rank, self.ranks, self.runs, self.flat = dist.get_rank(group), dist.get_world_size(group), runs, flat
        self.bucket = torch.empty(self.ranks, columns, dtype=dtype, device=flat.device)
        self.mine = torch.empty(columns, dtype=dtype, device=flat.device)
        self._fill()
        self.work: Any = dist.reduce_scatter_tensor(self.mine, self.bucket.view(-1), group=group, async_op=True)

    def _fill(self) -> None:
        into, gradients = [], []
        for run in self.runs:
            place = self.bucket[run.rank, run.column : run.column + run.count]
            if run.parameter.grad is None:
                place.zero_()
            else:
                into.append(place)
                gradients.append(run.parameter.grad.reshape(-1)[run.first : run.first + run.count])
        if into:
            torch._foreach_copy_(into, gradients)

    def place(self) -> None:
        """Puts this rank's row, averaged, into its part of all gradients."""
        self.work.wait()
        self.mine *= 1.0 / self.ranks
        own = [run for run in self.runs if run.rank == self.rank]
        if own:
            into = [self.flat[run.place : run.place + run.count] for run in own]
            torch._foreach_copy_(into, [self.mine[run.column : run.column + run.count] for run in own])
