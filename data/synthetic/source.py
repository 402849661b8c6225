"""Generated tasks as a source of training data: in place of a folder of token shards, and in place of a reader of windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.loader import Labelled, Reader, Rows
from data.synthetic import build_task, to_dict
from data.synthetic.task import IGNORE, SAMPLE_BITS, Draws, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1  # raise it when a task draws other samples than before: runs then do not resume over the change


class SyntheticSet:
    """One split of a task, with what training asks of a ShardSet: vocabulary, tokenizer, fingerprint. Raises ValueError for a bad task."""

    def __init__(self, mapping: dict[str, Any], split: str) -> None:
        self.task, self.split = build_task(mapping), split
        self.mapping = to_dict(self.task)
        self.directory = Path("synthetic") / self.mapping["name"]
        self.vocab_size = len(self.task.vocabulary())
        self.tokenizer_sha256 = hashlib.sha256(" ".join(self.task.vocabulary()).encode()).hexdigest()
        self.fingerprint = hashlib.sha256(json.dumps([FORMAT, self.mapping], sort_keys=True).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """One token per word of the task's vocabulary; text is the names with spaces between."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        names = self.task.vocabulary()
        tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return tokenizer


class SyntheticReader(Reader):
    """Sample k of a split: a pure function of (seed, split, k, length), so a run resumes exactly and no sample ever comes twice."""

    samples_per_epoch = 1 << SAMPLE_BITS

    def __init__(self, task: Task, seq_len: int, seed: int, split: str = "train") -> None:
        if seq_len < task.min_length():
            raise ValueError(f"train.seq_len={seq_len} is too short for this task; it needs {task.min_length()} or more.")
        Draws(seed, split, np.zeros(1, np.int64))  # refuses a seed it cannot take
        self.task, self.seq_len, self.seed, self.split = task, seq_len, seed, split

    def labelled(self, k_R: np.ndarray) -> Labelled:
        inputs, labels = self.task.sample(Draws(self.seed, self.split, k_R), self.seq_len)
        return inputs, labels, np.zeros(inputs.shape, dtype=np.int32)

    def samples(self, k_R: np.ndarray) -> Rows:
        """The tokens alone, a filler at the end where other readers have the last label; the answers are in `labelled`."""
        inputs, _, segments = self.labelled(k_R)
        return np.pad(inputs, ((0, 0), (0, 1))), np.pad(segments, ((0, 0), (0, 1)))


__all__ = ["FORMAT", "IGNORE", "SyntheticReader", "SyntheticSet"]
