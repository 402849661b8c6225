"""Batches of training data, ready before they are needed, in an order that is a pure function of (seed, step).

Global sample k is found by arithmetic: which source (Mixture), which epoch, which window (Permutation). Step s of a run with G sequences
per step is samples sG .. sG+G-1, whatever the number of ranks, the micro-batch or the moment the run was resumed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.order import Mixture, Permutation
from data.shards import ShardSet


@dataclass
class Batch:
    """One micro-batch: input_ids and labels (b, T) int64, segment_ids (b, T) int32, and the global sample of each row."""

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    sample_ids: list[int]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, without waiting for the copy."""
        move = [t.to(device, non_blocking=True) for t in (self.input_ids, self.labels, self.segment_ids)]
        return Batch(move[0], move[1], move[2], self.sample_ids)

    def pin(self) -> Batch:
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory(), self.segment_ids.pin_memory(), self.sample_ids)


class Reader(Protocol):
    """Global sample k as (tokens (T+1,) int64, segment ids (T+1,) int32)."""

    seq_len: int
    samples_per_epoch: int

    def sample(self, k: int) -> tuple[np.ndarray, np.ndarray]: ...


def segments(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Document number of each token within the row: it rises at every end-of-text mark, which starts a document."""
    return np.cumsum(tokens == eot, dtype=np.int32)


class WindowReader:
    """Shuffled fixed windows: window i of a source holds inputs iT .. iT+T-1 and their labels; an epoch sees each window once."""

    def __init__(self, shards: list[tuple[ShardSet, float]], seq_len: int, seed: int) -> None:
        self.shards, self.seq_len, self.seed = [s for s, _ in shards], seq_len, seed
        self.windows = [(s.n_tokens - 1) // seq_len for s in self.shards]
        short = [str(s.directory) for s, n in zip(self.shards, self.windows) if n == 0]
        if short:
            raise ValueError(f"{short[0]} has fewer tokens than one sequence of train.seq_len={seq_len}; shorten it or prepare more text.")
        self.mixture = Mixture([w for _, w in shards], seed)
        self.samples_per_epoch = sum(self.windows)
        self._orders: dict[tuple[int, int], Permutation] = {}

    def _order(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k[1] >= epoch - 1}
            self._orders[key] = Permutation(self.windows[source], self.seed, source, epoch)
        return self._orders[key]

    def window(self, k: int) -> tuple[int, int]:
        """(source, window) of global sample k."""
        source, index = self.mixture(k)
        epoch, place = divmod(index, self.windows[source])
        return source, int(self._order(source, epoch)(place)[0])

    def sample(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        source, window = self.window(k)
        shard = self.shards[source]
        tokens = shard.read(window * self.seq_len, self.seq_len + 1).astype(np.int64)
        return tokens, segments(tokens, shard.eot_id)


class StreamReader:
    """Row b of a global batch reads one long stretch of the data: in the next step it goes on where it stopped. One source."""

    def __init__(self, shards: list[tuple[ShardSet, float]], seq_len: int, rows: int) -> None:
        if len(shards) != 1:
            raise ValueError("data.reader=stream reads one folder; give data.path a single one.")
        self.shard, self.seq_len, self.rows = shards[0][0], seq_len, rows
        self.steps = (self.shard.n_tokens - 1) // rows // seq_len
        if self.steps == 0:
            raise ValueError(
                f"{self.shard.directory} is too short for {rows} streams of train.seq_len={seq_len}; lower train.global_batch."
            )
        self.samples_per_epoch = self.steps * rows

    def sample(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        step, row = divmod(k, self.rows)
        first = row * self.steps * self.seq_len
        start = first + step % self.steps * self.seq_len
        tokens = self.shard.read(start, self.seq_len + 1).astype(np.int64)
        # Segment ids must agree from step to step, so they count from the start of the row's stretch.
        base = np.searchsorted(self.shard.document_starts, start) - np.searchsorted(self.shard.document_starts, first)
        return tokens, segments(tokens, self.shard.eot_id) + np.int32(base)


def build_reader(shards: list[tuple[ShardSet, float]], reader: str, seq_len: int, seed: int, rows: int) -> Any:
    """`windows` or `stream`. Raises ValueError when the data is too short."""
    return WindowReader(shards, seq_len, seed) if reader == "windows" else StreamReader(shards, seq_len, rows)


class BatchLoader:
    """Iterates over steps from `start_step`: each item is the list of this rank's micro-batches. A thread keeps `prefetch` steps ready."""

    def __init__(
        self,
        reader: Reader,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        prefetch: int = 4,
        pin: bool = False,
    ) -> None:
        assert global_batch % (micro_batch * world_size) == 0
        self.reader, self.global_batch, self.micro_batch, self.pin = reader, global_batch, micro_batch, pin
        self.first_row = rank * (global_batch // world_size)
        self.last_row = self.first_row + global_batch // world_size
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="batches", daemon=True)
        self._thread.start()

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""
        result = []
        for begin in range(self.first_row, self.last_row, self.micro_batch):
            ids = [step * self.global_batch + row for row in range(begin, begin + self.micro_batch)]
            rows = [self.reader.sample(k) for k in ids]
            tokens = torch.from_numpy(np.stack([t for t, _ in rows]))
            segment_ids = torch.from_numpy(np.stack([s for _, s in rows]))
            batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), segment_ids[:, :-1].contiguous(), ids)
            result.append(batch.pin() if self.pin else batch)
        return result

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Any = self.step(step)
            except Exception as error:  # surfaces in the consumer
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return
            step += 1

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            item = self._queue.get()
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
