"""Batches of training data, ready before they are needed, in an order that is a pure function of (seed, step).

Global sample k is found by arithmetic: which source (Mixture), which epoch, which window (Permutation). A step takes the next G samples, whatever
the number of ranks, the micro-batch or the moment the run was resumed: step s of a run whose G never changed is samples sG .. sG+G-1.
Ranks that share sequences read the same rows and keep their slice of the time, labels and segments included.
Dimensions: R rows fetched at once, T sequence length, L = T + 1 (inputs and the last label).
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from data.order import Blend, Permutation
from data.shards import ShardSet

Rows = tuple[np.ndarray, np.ndarray]
Labelled = tuple[np.ndarray, np.ndarray, np.ndarray]


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
        """The batch in page-locked memory, from where copies to a GPU need not be waited for."""
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory(), self.segment_ids.pin_memory(), self.sample_ids)


class Reader:
    """Finds global samples by their number. A reader of another kind only has to define `samples`."""

    seq_len: int

    def samples(self, k_R: np.ndarray) -> Rows:
        """(tokens (R, T+1) int64, segment ids (R, T+1) int32) of the global samples `k_R`."""
        raise NotImplementedError

    def labelled(self, k_R: np.ndarray) -> Labelled:
        """(inputs (R, T) int64, labels (R, T) int64, segment ids (R, T) int32): here the label of a token is the next one."""
        tokens_RL, segments_RL = self.samples(k_R)
        return tokens_RL[:, :-1], tokens_RL[:, 1:], segments_RL[:, :-1]

    def sample(self, k: int) -> Rows:
        """(tokens (T+1,), segment ids (T+1,)) of one global sample."""
        tokens_RL, segments_RL = self.samples(np.array([k], dtype=np.int64))
        return tokens_RL[0], segments_RL[0]


class WindowReader(Reader):
    """Shuffled fixed windows: window i of a source holds inputs iT .. iT+T-1 and their labels; an epoch of a source has each window once.

    The last (n_tokens - 1) % T tokens of a source fill no window and are not read. stretches: of a run whose weights changed, see Blend.
    """

    def __init__(
        self, shards: list[tuple[ShardSet, float]], seq_len: int, seed: int, stretches: list[tuple[int, list[float]]] | None = None
    ) -> None:
        self.shards, self.seq_len, self.seed = [s for s, _ in shards], seq_len, seed
        self.windows = [(s.n_tokens - 1) // seq_len for s in self.shards]
        short = [str(s.directory) for s, n in zip(self.shards, self.windows) if n == 0]
        if short:
            raise UserError(f"{short[0]} has fewer tokens than one sequence of train.seq_len={seq_len}; shorten it or prepare more text.")
        self.mixture = Blend(stretches or [(0, [w for _, w in shards])], seed)
        self._orders: dict[tuple[int, int], Permutation] = {}

    def _order(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._orders:
            if len(self._orders) > 4 * len(self.shards):
                self._orders.clear()
            self._orders[key] = Permutation(self.windows[source], self.seed, source, epoch)
        return self._orders[key]

    def locate(self, k_R: np.ndarray) -> Rows:
        """(source, window), both (R,) int64, of the global samples `k_R`."""
        source_R, index_R = self.mixture.locate(k_R)
        window_R = np.empty_like(index_R)
        for source in np.unique(source_R).tolist():
            epoch_R, place_R = np.divmod(index_R, self.windows[source])
            for epoch in np.unique(epoch_R[source_R == source]).tolist():
                chosen = (source_R == source) & (epoch_R == epoch)
                window_R[chosen] = self._order(source, epoch)(place_R[chosen])
        return source_R, window_R

    def window(self, k: int) -> tuple[int, int]:
        """(source, window) of global sample k."""
        source, window = self.locate(np.array([k], dtype=np.int64))
        return int(source[0]), int(window[0])

    def samples(self, k_R: np.ndarray) -> Rows:
        source_R, window_R = self.locate(k_R)
        if len(self.shards) == 1:
            return self.shards[0].rows(window_R * self.seq_len, self.seq_len + 1)
        tokens_RL = np.empty((len(k_R), self.seq_len + 1), dtype=np.int64)
        segments_RL = np.empty((len(k_R), self.seq_len + 1), dtype=np.int32)
        for source in np.unique(source_R).tolist():
            chosen = source_R == source
            tokens_RL[chosen], segments_RL[chosen] = self.shards[source].rows(window_R[chosen] * self.seq_len, self.seq_len + 1)
        return tokens_RL, segments_RL


class StreamReader(Reader):
    """Row b of a global batch reads one long stretch of the data: in the next step it goes on where it stopped. One source.

    Segment ids of a row rise through its stretch and on through the epochs, so a carried state knows when its document has ended.
    """

    def __init__(self, shards: list[tuple[ShardSet, float]], seq_len: int, rows: int) -> None:
        if len(shards) != 1:
            raise UserError("data.reader=stream reads one folder; give data.path a single one.")
        self.shard, self.seq_len, self.rows = shards[0][0], seq_len, rows
        self.steps = (self.shard.n_tokens - 1) // rows // seq_len
        if self.steps == 0:
            raise UserError(f"{self.shard.directory} is too short for {rows} streams of train.seq_len={seq_len}; lower train.global_batch.")
        first = np.arange(rows, dtype=np.int64) * (self.steps * seq_len)
        self.opened = self.shard.document_of(first)  # document in which the stretch of each row begins, and how many it has part in
        self.passed = self.shard.document_of(first + self.steps * seq_len - 1) - self.opened + 1

    def samples(self, k_R: np.ndarray) -> Rows:
        step_R, row_R = np.divmod(np.asarray(k_R, dtype=np.int64), self.rows)
        epoch_R, place_R = np.divmod(step_R, self.steps)
        start_R = row_R * (self.steps * self.seq_len) + place_R * self.seq_len
        tokens_RL, segments_RL = self.shard.rows(start_R, self.seq_len + 1)
        base_R = epoch_R * self.passed[row_R] + self.shard.document_of(start_R) - self.opened[row_R]
        return tokens_RL, segments_RL + base_R.astype(np.int32)[:, None]


def build_reader(
    shards: list[tuple[ShardSet, float]],
    reader: str,
    seq_len: int,
    seed: int,
    rows: int,
    stretches: list[tuple[int, list[float]]] | None = None,
) -> WindowReader | StreamReader:
    """`windows` (with weights that changed during the run, see Blend) or `stream` (of `rows` rows). Raises ValueError for another name, different tokenizers, or too little data."""
    if not shards:
        raise UserError("There are no token shards to read; give data.path a folder.")
    if reader not in ("windows", "stream"):
        raise UserError(f"data.reader must be windows or stream, not {reader!r}.")
    if seq_len < 1 or rows < 1:
        raise ValueError(f"Sequences and batches must have at least one token and row, not {seq_len} and {rows}.")
    if len({s.tokenizer_sha256 for s, _ in shards}) > 1:
        raise UserError("The folders of data.path were made with different tokenizers; prepare them again with one.")
    return WindowReader(shards, seq_len, seed, stretches) if reader == "windows" else StreamReader(shards, seq_len, rows)


class BatchLoader:
    """An iterator over steps from `start_step`: each item is the list of this rank's micro-batches, `micro_batch` rows each.

    replica, replicas: of the `replicas` sets of rows that a global batch of `global_batch` rows is divided into, this rank reads the one numbered
    `replica`. slice_of: (n, N) keeps the n-th of N slices of the time of each row. first_sample: the sample that step `start_step` begins with,
    where the steps before it had another batch (else start_step x global_batch). prefetch: steps that a thread keeps ready; pin: in page-locked
    memory. An error in the thread is raised by next(), and by every next() after it. Raises ValueError when the batch cannot be divided.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        global_batch: int,
        micro_batch: int,
        replica: int = 0,
        replicas: int = 1,
        slice_of: tuple[int, int] = (0, 1),
        start_step: int = 0,
        first_sample: int | None = None,
        prefetch: int = 4,
        pin: bool = False,
    ) -> None:
        if min(global_batch, micro_batch, replicas) < 1 or global_batch % (micro_batch * replicas) or not 0 <= replica < replicas:
            raise UserError(
                f"A global batch of {global_batch} cannot be divided into micro-batches of {micro_batch} on rank {replica} of {replicas}."
            )
        self.reader, self.global_batch, self.micro_batch, self.pin = reader, global_batch, micro_batch, pin
        if not 0 <= slice_of[0] < slice_of[1] or reader.seq_len % slice_of[1]:
            raise ValueError(f"Sequences of {reader.seq_len} tokens have no slice {slice_of[0]} of {slice_of[1]}.")
        T = reader.seq_len // slice_of[1]
        self.time = slice(slice_of[0] * T, (slice_of[0] + 1) * T)
        self.offset = 0 if first_sample is None else first_sample - start_step * global_batch
        self.first_row = replica * (global_batch // replicas)
        self.last_row = self.first_row + global_batch // replicas
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, prefetch))
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="batches", daemon=True)
        self._thread.start()

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""
        k_R = self.offset + step * self.global_batch + np.arange(self.first_row, self.last_row, dtype=np.int64)
        rows = [torch.from_numpy(part[:, self.time]) for part in self.reader.labelled(k_R)]
        result = []
        for i in range(0, len(k_R), self.micro_batch):
            inputs, labels, segment_ids = (part[i : i + self.micro_batch].contiguous() for part in rows)
            batch = Batch(inputs, labels, segment_ids, k_R[i : i + self.micro_batch].tolist())
            result.append(batch.pin() if self.pin else batch)
        return result

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                item: Any = self.step(step)
            except BaseException as error:  # surfaces in the consumer
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> list[Batch]:
        while self._error is None and not self._stop.is_set():
            try:
                item = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            if not isinstance(item, BaseException):
                return item
            self._error = item
        if self._error is not None:
            raise self._error
        raise StopIteration

    def fetch(self) -> tuple[list[Batch], str]:
        """(the next step's micro-batches, ''), or ([], a sentence) when the data can no longer be read: then all ranks have to stop together."""
        try:
            return next(self), ""
        except (OSError, ValueError) as error:
            return [], str(error)

    def close(self) -> None:
        """Ends the thread; a read that hangs (a dead network disk) is not waited for."""
        self._stop.set()
        self._thread.join(timeout=5.0)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
