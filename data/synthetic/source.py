"""Generated tasks as a source of training data: in place of a folder of token shards, and in place of a reader of windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.errors import UserError
from data.loader import Labelled, Reader, Rows
from data.synthetic import build_task, to_dict
from data.synthetic.task import IGNORE, Draws, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE, MOST_PIECES = 4, 8  # shortest sequence of a curriculum, and how many samples a row may take
FORMAT = 1  # raise it when a task draws other samples than before: runs then do not resume over the change


class SyntheticSet:
    """One split of a task, with what training asks of a ShardSet: vocabulary, tokenizer, fingerprint. Raises UserError for a bad task."""

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

    def tokenizer_config(self) -> dict[str, Any]:
        """No marks: nothing stands around a sequence of a task."""
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


class SyntheticReader(Reader):
    """Row k of a split: a pure function of (seed, split, k, length), so a run resumes exactly and no sample ever comes twice.

    curriculum: rows below `curriculum` hold shorter sequences, as many as fit (eight at most), each a segment of its own: first of 1/8, then of 1/4, then of
    1/2 of the length, for a third of those rows each (never shorter than the task allows). What is left of a row is not asked for.
    """

    def __init__(self, task: Task, seq_len: int, seed: int, split: str = "train", curriculum: int = 0) -> None:
        if seq_len < task.min_length():
            raise UserError(f"train.seq_len={seq_len} is too short for this task; it needs {task.min_length()} or more.")
        Draws(seed, split, np.zeros(1, np.int64))  # refuses a seed it cannot take
        if curriculum < 0:
            raise UserError(f"data.curriculum must be a number of sequences, or 0 for none, not {curriculum}.")
        self.task, self.seq_len, self.seed, self.split, self.curriculum = task, seq_len, seed, split, curriculum

    def lengths(self, k_R: np.ndarray) -> np.ndarray:
        """(R,) the length of the sequences in each row."""
        stage_R = np.minimum(3, 3 * np.asarray(k_R, dtype=np.int64) // max(1, self.curriculum)) if self.curriculum else np.full(len(k_R), 3)
        return np.maximum(self.seq_len >> (3 - stage_R), min(self.seq_len, max(PIECE, self.task.min_length())))

    def labelled(self, k_R: np.ndarray) -> Labelled:
        k_R, T = np.asarray(k_R, dtype=np.int64), self.seq_len
        length_R = self.lengths(k_R)
        inputs, labels = np.zeros((len(k_R), T), np.int64), np.full((len(k_R), T), IGNORE, np.int64)
        segments = np.zeros((len(k_R), T), np.int32)
        for n in np.unique(length_R).tolist():
            chosen, pieces = np.flatnonzero(length_R == n), min(T // n, MOST_PIECES)
            number = (k_R[chosen, None] * MOST_PIECES + np.arange(pieces)).ravel()
            drawn = self.task.sample(Draws(self.seed, self.split, number), n)
            for target, part in zip((inputs, labels), drawn):
                target[chosen, : pieces * n] = part.reshape(len(chosen), pieces * n)
            segments[chosen] = np.arange(T) // n
        return inputs, labels, segments

    def samples(self, k_R: np.ndarray) -> Rows:
        """The tokens alone, a filler at the end where other readers have the last label; the answers are in `labelled`."""
        inputs, _, segments = self.labelled(k_R)
        return np.pad(inputs, ((0, 0), (0, 1))), np.pad(segments, ((0, 0), (0, 1)))


__all__ = ["FORMAT", "IGNORE", "SyntheticReader", "SyntheticSet"]
