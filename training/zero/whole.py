"""ZeRO-3 whose weights are gathered once a step, behind the update, and whose gradients are reduced once, behind the passes (`deepspeed.gather=step`).

DeepSpeed gathers the weights of a block before each use and lets them go behind it, in hooks around blocks and gradients. They take the host 2 to 4 ms
a block, in which the device waits, and no CUDA graph can hold them. Here these hooks are off: weights stay whole in memory that does not move, so that a
pass may be a graph, and gradients are whole until they are reduced. Moments and the master copy are divided as ever, and DeepSpeed's step goes on
from what its own reduction would have left. The price is 8 bytes a parameter on every rank, what ZeRO-1 takes: this is for models whose activations
are what fills the device. Sums are taken in the dtypes that DeepSpeed would take, see `policy.reduction`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.zero import patches
from training.zero.at_once import Bucket, Partition, Run, Sent, by_dtype, in_turn, leave


def cuts(parameters: list[nn.Parameter], sizes: list[int], starts: list[int], ranks: int, columns: int) -> Iterator[tuple[int, list[Run]]]:
    """(columns, runs) of each bucket, a matrix of `ranks` rows whose row r is of rank r, for parameters that are each cut into `ranks` equal parts.
    sizes, starts: how many elements a part of each has (the last may be shorter) and where it lies in all parts of a rank."""
    filled, made = 0, list[list[Run]]()
    for parameter, size, start in zip(parameters, sizes, starts):
        at = 0
        while at < size:
            number, column = divmod(filled, columns)
            if number == len(made):
                made.append([])
            count = min(size - at, columns - column)
            for rank in range(ranks):
                first = rank * size + at
                there = min(count, parameter.numel() - first)
                if there > 0:
                    made[number].append(Run(parameter, first, there, rank, start + at, column))
            filled += count
            at += count
    for number, runs in enumerate(made):
        yield min(columns, filled - number * columns), runs


class Fetch:
    """A bucket of weights to be gathered: columns first .. first+columns-1 of every rank's part of a group, and where each piece of them belongs."""

    def __init__(self, first: int, columns: int, runs: list[Run]) -> None:
        self.first, self.columns = first, columns
        self.into = [run.parameter.data.view(-1)[run.first : run.first + run.count] for run in runs]  # whole weights stay where they are
        begins = sorted({run.column for run in runs})
        self.widths = [end - begin for begin, end in zip(begins, [*begins[1:], columns])]
        place = {begin: number for number, begin in enumerate(begins)}
        numbers = [place[run.column] for run in runs]
        self.picks = [(run.rank, number, run.count if run.count < self.widths[number] else None) for run, number in zip(runs, numbers)]


class Arriving:
    """A bucket of weights on its way to this rank; flat: its part of the group."""

    def __init__(self, group: Any, flat: Tensor, fetch: Fetch) -> None:
        self.fetch = fetch
        self.every = flat.new_empty(dist.get_world_size(group), fetch.columns)
        part = flat[fetch.first : fetch.first + fetch.columns]
        self.work: Any = dist.all_gather_into_tensor(self.every.view(-1), part, group=group, async_op=True)

    def place(self) -> None:
        """Puts it into the whole weights."""
        self.work.wait()
        rows = [row.split(self.fetch.widths) for row in self.every.unbind()]
        pieces = [rows[rank][number] for rank, number, _ in self.fetch.picks]
        for i, (_, _, shorter) in enumerate(self.fetch.picks):  # at the end of a parameter that ranks do not divide
            if shorter is not None:
                pieces[i] = pieces[i][:shorter]
        torch._foreach_copy_(self.fetch.into, pieces)


class Whole:
    """Keeps the weights of a ZeRO-3 optimizer of DeepSpeed whole, and reduces their gradients; elements: numbers in a bucket."""

    def __init__(self, optimizer: Any, elements: int) -> None:
        self.optimizer, self.group = optimizer, optimizer.dp_process_group
        ranks = dist.get_world_size(self.group)
        columns = max(1, elements // ranks)
        patches.keep_whole(optimizer)
        self.plans: list[list[Bucket]] = []  # of each group, its buckets of gradients
        self.fetches: list[list[Fetch]] = []  # and of weights
        self.flats: list[Tensor] = []  # this rank's gradients of each group, zeros where the last parts are shorter
        self.pieces: list[list[Tensor]] = []  # and of each parameter
        used = 0
        for parameters in optimizer.fp16_groups:
            sizes = [int(p.ds_tensor.ds_numel) for p in parameters]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self.flats.append(optimizer.grad_partitions_flat_buffer[used : used + sum(sizes)])
            self.pieces.append(list(self.flats[-1].split(sizes)))
            used += sum(sizes)
            self.plans.append(
                [
                    (dtype, *bucket)
                    for dtype, numbers in by_dtype(optimizer, parameters).items()
                    for bucket in cuts(
                        [parameters[n] for n in numbers], [sizes[n] for n in numbers], [starts[n] for n in numbers], ranks, columns
                    )
                ]
            )
            self.fetches.append(
                [Fetch(i * columns, width, runs) for i, (width, runs) in enumerate(cuts(parameters, sizes, starts, ranks, columns))]
            )
        patches.take_flat_gradients(optimizer)
        patches.gather_behind(optimizer, self.gather)
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Makes the weights those of all ranks' parts. Collective; nothing waits for the device."""
        for flat, fetches in zip(self.optimizer.fp16_partitioned_groups_flat, self.fetches):
            in_turn(Arriving(self.group, flat, fetch) for fetch in fetches)

    @torch.no_grad()
    def reduce(self) -> None:
        """Averages the gradients that lie in the parameters over ranks and leaves this rank's part to DeepSpeed's step, with its norm; the others are
        gone. Collective; nothing waits for the device. One bucket is filled while the one before it is sent."""
        for plan, flat in zip(self.plans, self.flats):
            in_turn(Sent(self.group, *bucket, flat) for bucket in plan)
        leave(self.optimizer, [Partition(*group) for group in zip(self.pieces, self.flats)], self.optimizer.fp16_groups)
