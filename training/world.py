"""The ranks of a run: who this process is among them, what they tell each other, and how they come together.

Here and in training/engine.py, training/passes.py, training/zero and training/saving is all that knows of ranks and devices; what a launcher says of
them is read in training/launch.py.
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.errors import UserError, reason_of
from training.launch import USUAL, launch, local_rank, unreachable
from training.watch.clock import CommunicationClock
from training.zero import patches


@dataclass
class World:
    """Where this process stands: its rank among `size`, its device, and what it asks of the other ranks, who all call such a method together.

    sequence: how many neighbouring ranks share rows and hold a slice of their time each; group: the process group of these. clock: measures
    communication, None with a single rank.
    """

    rank: int
    size: int
    device: torch.device
    sequence: int = 1
    group: Any = None
    clock: CommunicationClock | None = None

    @property
    def replica(self) -> int:
        """Which of the `replicas` sets of rows this rank reads."""
        return self.rank // self.sequence

    @property
    def replicas(self) -> int:
        return self.size // self.sequence

    @property
    def slice_of(self) -> tuple[int, int]:
        """(n, N): this rank holds the n-th of N slices of time."""
        return self.rank % self.sequence, self.sequence

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks, in fp64; every rank gets the same numbers."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, pin_memory=self.device.type == "cuda").to(self.device, non_blocking=True)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, values: list[float]) -> list[list[float]]:
        """The values of every rank, in order, on every rank."""
        table = [0.0] * (len(values) * self.size)
        table[len(values) * self.rank : len(values) * (self.rank + 1)] = values
        table = self.sum(table)
        return [table[a : a + len(values)] for a in range(0, len(table), len(values))]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def texts(self, text: str) -> list[str]:
        """The text of every rank, on every rank."""
        if self.size == 1:
            return [text]
        data = text.encode()
        lengths = [int(n) for n in self.sum([float(len(data)) if r == self.rank else 0.0 for r in range(self.size)])]
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded)
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths)]

    def on_main(self, folder: Path, write: Callable[[], Any]) -> None:
        """`write()` on rank 0. Raises UserError on every rank when `folder` does not take it."""
        problem = ""
        if self.main:
            try:
                write()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"The run folder {folder} cannot be written: {reason_of(error)}."
        problem = self.texts(problem)[0]
        if problem:
            raise UserError(problem)


def pick_device(wanted: str, key: str = "train.device") -> torch.device:
    """auto | cpu | cuda to a device of this rank; `key` is what the user calls it. Raises UserError when CUDA is asked for and absent."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"{key} is {wanted!r}; choose auto, cpu or cuda.")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device; use train.device=auto or install a CUDA build of torch.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def start_distributed(wanted_device: str, timeout_minutes: float = 30.0, sequence: int = 1) -> World:
    """Joins the process group that the launcher described, or makes one of a single rank; every `sequence` neighbouring ranks share rows.

    Raises UserError for an environment that makes no sense, and where the ranks cannot meet within `timeout_minutes`."""
    launched = launch()
    device = pick_device(wanted_device)
    for key, value in USUAL.items():
        os.environ.setdefault(key, value)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        torch.cuda.set_device(device)
    clock = CommunicationClock(device) if launched.size > 1 else None
    if clock is not None:
        clock.install()
    # torch 2.13 says so of collectives that DeepSpeed calls and that torch 2.11, which is allowed too, has under no other name.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Silences messages of the import itself; set again below, because the import changes the level.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    patches.without_shared_memory_build()
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "nccl"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        try:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        except dist.DistNetworkError as error:
            raise unreachable(error) from error
    rank, size, group = dist.get_rank(), dist.get_world_size(), None
    for first in range(0, size, sequence) if sequence > 1 else ():  # every rank has to take part in making every group
        replica_group = dist.new_group(list(range(first, first + sequence)), timeout=datetime.timedelta(minutes=timeout_minutes))
        group = replica_group if first <= rank < first + sequence else group
    return World(rank, size, device, sequence, group, clock)
