"""Accuracy of a model on a generated task, by length, up to many times the training length (evals/state_tracking.py is the program).

Samples come from the evaluation streams, which training of no seed draws from; long sequences are fed in chunks with carried state.
Legend: R sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.synthetic import build_task, to_dict
from data.synthetic.task import IGNORE, Draws, Task
from models.lm import LanguageModel
from models.prompt import read_at_once
from training.errors import UserError

BUCKETS = 16  # positions are counted in this many stretches of the sequence


@dataclass
class Counts:
    """Sums over sequences, which add up over ranks.

    by_place: answers right in each of BUCKETS equal stretches of the sequence, then those asked there; labels: how often each token is the answer.
    """

    sequences: int = 0
    asked: int = 0
    right: int = 0
    last_right: int = 0
    all_right: int = 0
    share: float = 0.0  # of right answers in a sequence, 0 to 1, summed over sequences
    share_squared: float = 0.0  # its square, summed
    by_place: list[int] = field(default_factory=lambda: [0] * (2 * BUCKETS))
    labels: list[int] = field(default_factory=list)

    def add(self, right_RT: np.ndarray, labels_RT: np.ndarray, vocabulary: int) -> None:
        """Adds sequences. right_RT: whether the model's choice is the label (False where nothing is asked); labels_RT: ids, IGNORE elsewhere."""
        asked_RT = labels_RT != IGNORE
        R, T = labels_RT.shape
        share_R = right_RT.sum(1) / asked_RT.sum(1)
        last_R = T - 1 - np.argmax(asked_RT[:, ::-1], axis=1)
        self.sequences += R
        self.asked += int(asked_RT.sum())
        self.right += int(right_RT.sum())
        self.last_right += int(right_RT[np.arange(R), last_R].sum())
        self.all_right += int((share_R == 1).sum())
        self.share += float(share_R.sum())
        self.share_squared += float(np.square(share_R).sum())
        bucket_T = np.arange(T) * BUCKETS // T
        for offset, hits_RT in ((0, right_RT), (BUCKETS, asked_RT)):
            sums = np.bincount(bucket_T, weights=hits_RT.sum(0), minlength=BUCKETS)
            for i in range(BUCKETS):
                self.by_place[offset + i] += int(sums[i])
        counts = np.bincount(labels_RT[asked_RT], minlength=vocabulary)
        self.labels = (counts + np.array(self.labels or [0] * vocabulary)).tolist()

    def flat(self) -> list[float]:
        """All numbers in a row, for a sum over ranks."""
        scalars = [self.sequences, self.asked, self.right, self.last_right, self.all_right, self.share, self.share_squared]
        return [float(x) for x in [*scalars, *self.by_place, *self.labels]]

    @staticmethod
    def from_flat(values: list[float]) -> Counts:
        """The counts whose `flat` gave these numbers, or the sum of several such."""
        sequences, asked, right, last_right, all_right = (int(v) for v in values[:5])
        places, labels = [int(v) for v in values[7 : 7 + 2 * BUCKETS]], [int(v) for v in values[7 + 2 * BUCKETS :]]
        return Counts(sequences, asked, right, last_right, all_right, values[5], values[6], places, labels)

    def to_dict(self, length: int) -> dict[str, Any]:
        """Shares from 0 to 1 at `length` tokens, JSON-able.

        accuracy: of right answers; ci95: its 95 % interval, from the spread over sequences; last: of sequences whose last answer is right; exact: of
        those with every answer right; chance: what always giving the commonest answer would score; by_position: accuracy from a token on.
        """
        mean = self.share / self.sequences
        spread = math.sqrt(max(0.0, self.share_squared / self.sequences - mean**2) / self.sequences)
        places = [
            (-(-i * length // BUCKETS), right / asked)
            for i, (right, asked) in enumerate(zip(self.by_place[:BUCKETS], self.by_place[BUCKETS:]))
            if asked
        ]
        return {
            "length": length,
            "accuracy": self.right / self.asked,
            "ci95": [max(0.0, mean - 1.96 * spread), min(1.0, mean + 1.96 * spread)],
            "last": self.last_right / self.sequences,
            "exact": self.all_right / self.sequences,
            "chance": max(self.labels) / self.asked,
            "sequences": self.sequences,
            "answers": self.asked,
            "by_position": [{"from": start, "accuracy": value} for start, value in places],
        }


@torch.no_grad()
def count(
    model: LanguageModel,
    task: Task,
    length: int,
    *,
    sequences: int = 1000,
    seed: int = 0,
    batch: int = 64,
    chunk: int = 512,
    precision: str = "fp32",
    rank: int = 0,
    world_size: int = 1,
) -> Counts:
    """What `model` gets right on evaluation samples 0 .. sequences-1 of `length` tokens (this rank's share of them).

    batch: sequences at a time; sequences of more than `chunk` tokens are fed in chunks with carried state. Raises UserError when the task
    cannot have that length, the model lacks tokens for it, or its outputs are not finite.
    """
    vocabulary, device = len(task.vocabulary()), model.embedding.weight.device
    if length < task.min_length():
        raise UserError(f"Length {length} is too short for the task; it needs {task.min_length()} or more.")
    if model.config.vocab_size < vocabulary:
        raise UserError(f"The model has {model.config.vocab_size} tokens, the task needs {vocabulary}; it was trained on something else.")
    training = model.training
    model.eval()
    counts = Counts(labels=[0] * vocabulary)
    try:
        for start in range(rank * batch, sequences, world_size * batch):
            k_R = np.arange(start, min(start + batch, sequences))
            inputs, labels = task.sample(Draws(seed, "valid", k_R), length)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                answers = _answers(model, torch.from_numpy(inputs).to(device), chunk)
            if answers is None:
                raise UserError(f"The model's outputs at length {length} are not finite; it cannot be scored there.")
            counts.add((answers == labels) & (labels != IGNORE), labels, vocabulary)
    finally:
        model.train(training)
    return counts


def _answers(model: LanguageModel, inputs_RT: torch.Tensor, chunk: int) -> np.ndarray | None:
    """The likeliest token (R, T) at each position, None where logits are not finite."""
    T = inputs_RT.shape[1]
    chunk = max(chunk, read_at_once(model, T))
    state = model.init_state(inputs_RT.shape[0]) if T > chunk else None
    best, finite = [], torch.ones((), dtype=torch.bool, device=inputs_RT.device)
    for i in range(0, T, chunk):
        output = model(inputs_RT[:, i : i + chunk], state=state)
        assert output.logits is not None
        best.append(output.logits.argmax(-1))
        finite &= output.logits.isfinite().all()
        state = output.state
    return torch.cat(best, 1).cpu().numpy() if bool(finite) else None


def default_lengths(train_length: int, task: Task) -> list[int]:
    """1/2, 1, 2, 4 and 8 times the training length, in tokens, without those too short for the task."""
    return [n for n in (train_length // 2, *(m * train_length for m in (1, 2, 4, 8))) if n >= task.min_length()]


def accuracy_by_length(
    model: LanguageModel,
    task: Task | dict[str, Any],
    lengths: list[int],
    *,
    train_length: int | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Accuracy of a loaded model at each length in tokens, as a JSON-able dict; `options` are those of `count`.

    task: or the mapping of one. on_progress is called with the row of each length. What goes wrong at one length (out of memory, outputs that
    are not finite) is that length's 'error', and the others go on. Raises UserError for a mapping that is no task.
    """
    if isinstance(task, dict):
        task = build_task(task)
    rows = []
    for length in lengths:
        try:
            row = count(model, task, length, **options).to_dict(length)
        except UserError as error:
            row = {"length": length, "error": str(error)}
        except torch.OutOfMemoryError:
            row = {"length": length, "error": f"Length {length} does not fit into the device's memory; lower batch or chunk."}
        rows.append(row)
        if on_progress:
            on_progress(row)
    at_training = next((r.get("accuracy") for r in rows if r["length"] == train_length), None)
    return {"task": to_dict(task), "train_length": train_length, "accuracy": at_training, "lengths": rows}


def line(row: dict[str, Any]) -> str:
    """One length's row as a line under HEADING."""
    if "error" in row:
        return f"  {row['length']:>8}  {row['error']}"
    low, high = row["ci95"]
    return (
        f"  {row['length']:>8}  {100 * row['accuracy']:>7.2f}  [{100 * low:6.2f}, {100 * high:6.2f}]  {100 * row['last']:>7.2f}"
        f"  {100 * row['exact']:>7.2f}  {100 * row['chance']:>7.2f}"
    )


HEADING = "    length      all   [   95 % of all]     last    exact   chance   (per cent)"
