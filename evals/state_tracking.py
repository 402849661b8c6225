"""State tracking and recall: accuracy of a model on generated tasks, by length, up to many times the training length.

    python -m evals.state_tracking checkpoint=runs/parity-paragru [lengths=100,400,1600] [sequences=1000] [seed=0] [batch=64] [chunk=512]
                                   [device=auto] [precision=fp32] [out=FILE]

The task is the one the checkpoint was trained on. Samples come from the evaluation streams, which training of no seed draws from. Long
sequences are fed in chunks with carried state. The result is printed and written as JSON (default: eval-state_tracking.json beside the weights).
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.synthetic import build_task, to_dict
from data.synthetic.task import IGNORE, SEED_BITS, Draws, Task
from models.lm import LanguageModel
from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "lengths": [],
    "sequences": 1000,
    "seed": 0,
    "batch": 64,
    "chunk": 512,
    "device": "auto",
    "precision": "fp32",
    "out": None,
}
BUCKETS = 16  # positions are counted in this many stretches of the sequence


@dataclass
class Counts:
    """Sums over sequences, which add up over ranks. by_place: answers right and asked in each of BUCKETS equal stretches."""

    sequences: int = 0
    asked: int = 0
    right: int = 0
    last_right: int = 0
    all_right: int = 0
    share: float = 0.0  # of right answers, summed over sequences, and its square
    share_squared: float = 0.0
    by_place: list[int] = field(default_factory=lambda: [0] * (2 * BUCKETS))
    labels: list[int] = field(default_factory=list)

    def add(self, right_RT: np.ndarray, labels_RT: np.ndarray, vocabulary: int) -> None:
        """right_RT: the model's choice is the label (False where nothing is asked)."""
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
        sequences, asked, right, last_right, all_right = (int(v) for v in values[:5])
        places, labels = [int(v) for v in values[7 : 7 + 2 * BUCKETS]], [int(v) for v in values[7 + 2 * BUCKETS :]]
        return Counts(sequences, asked, right, last_right, all_right, values[5], values[6], places, labels)

    def to_dict(self, length: int) -> dict[str, Any]:
        """accuracy: share of right answers; last: at each row's last answer; exact: rows with all answers right; ci95: of the accuracy,
        from the spread over sequences; chance: of always giving the commonest answer; by_position: (from, accuracy) along the sequence."""
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

    Sequences above `chunk` are fed in pieces with carried state. Raises UserError when the task cannot have that length, the model
    lacks tokens for it, or its outputs are not finite.
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
    """1/2, 1, 2, 4 and 8 times the training length, as far as the task has them."""
    return [n for n in (train_length // 2, *(m * train_length for m in (1, 2, 4, 8))) if n >= task.min_length()]


def evaluate(
    model: LanguageModel,
    task: Task | dict[str, Any],
    lengths: list[int],
    *,
    train_length: int | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Accuracy of a loaded model by length, as a JSON-able dict; `options` are those of `count`.

    What goes wrong at one length (out of memory, outputs that are not finite) is that length's 'error'; the others go on.
    """
    if isinstance(task, dict):
        try:
            task = build_task(task)
        except ValueError as error:
            raise UserError(str(error).splitlines()) from error
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
    """One length's result for people."""
    if "error" in row:
        return f"  {row['length']:>8}  {row['error']}"
    low, high = row["ci95"]
    return (
        f"  {row['length']:>8}  {100 * row['accuracy']:>7.2f}  [{100 * low:6.2f}, {100 * high:6.2f}]  {100 * row['last']:>7.2f}"
        f"  {100 * row['exact']:>7.2f}  {100 * row['chance']:>7.2f}"
    )


HEADING = "    length      all   [   95 % of all]     last    exact   chance   (per cent)"


class Evaluator:
    """Scores the task in the training loop: at the training length every `eval.every` steps, at all lengths at the end."""

    def __init__(self, config: Any, engine: Any, metrics: Any) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.task = build_task(config.data.task)
        self.length = config.train.seq_len

    def at(self, step: int) -> None:
        """Runs what is due after optimizer step `step`."""
        every = self.config.eval.every
        if step == self.config.total_steps or not every or step % every:
            return  # at_end follows the last step
        row = self._row(self.length)
        if "error" in row:
            self.metrics.say(f"accuracy after step {step}: {row['error']}")
            return
        self.metrics.write(step, accuracy=row["accuracy"], accuracy_last=row["last"], accuracy_exact=row["exact"])
        self.metrics.say(
            f"accuracy after step {step}: {100 * row['accuracy']:.2f} % of answers, {100 * row['last']:.2f} % of last ones (chance {100 * row['chance']:.2f} %)"
        )

    def at_end(self, step: int) -> float:
        """Accuracy by length, written to eval.json as well; returns the share of wrong answers at the training length."""
        from data.files import write_json

        lengths = self.config.eval.lengths or default_lengths(self.length, self.task)
        rows = [self._row(n) for n in lengths]
        known = next((r for r in rows if r["length"] == self.length), None) or self._row(self.length)
        if "accuracy" in known:
            self.metrics.write(step, accuracy=known["accuracy"], accuracy_last=known["last"], accuracy_exact=known["exact"])
        self.metrics.say("\n".join([f"accuracy on {to_dict(self.task)}", HEADING, *map(line, rows)]))
        if self.engine.world.main:
            result = {"task": to_dict(self.task), "train_length": self.length, "accuracy": known.get("accuracy"), "lengths": rows}
            write_json(self.metrics.run_dir / "eval.json", {"step": step, "state_tracking": result})
        return 1.0 - known.get("accuracy", 0.0)

    def _row(self, length: int) -> dict[str, Any]:
        world, sequences = self.engine.world, max(1, self.config.eval.tokens // length)
        problem, counts = "", Counts(labels=[0] * len(self.task.vocabulary()))
        with self.engine.gathered(list(self.engine.parameters)):
            try:
                counts = count(
                    self.engine.module,
                    self.task,
                    length,
                    sequences=sequences,
                    seed=self.config.seed,
                    batch=min(64, -(-sequences // world.size)),
                    precision=self.config.train.precision,
                    rank=world.rank,
                    world_size=world.size,
                )
            except (UserError, torch.OutOfMemoryError) as error:
                problem = str(error).splitlines()[0]
        if world.any(bool(problem)):
            return {"length": length, "error": problem or "Another rank could not score this length."}
        return Counts.from_flat(world.sum(counts.flat())).to_dict(length)


def problems_of(values: dict[str, Any]) -> list[str]:
    """What cannot be run, a sentence each."""
    problems = []
    if not values["checkpoint"]:
        problems.append("Say what to evaluate: checkpoint=DIR.")
    if values["precision"] not in ("fp32", "bf16"):
        problems.append(f"precision is {values['precision']!r}; choose fp32 or bf16.")
    if values["seed"] >= 1 << SEED_BITS:
        problems.append(f"seed must be below {1 << SEED_BITS}, not {values['seed']}.")
    return problems


def evaluate_checkpoint(model: LanguageModel, meta: dict[str, Any], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """`evaluate` with the task and training length that a checkpoint's meta (models.checkpoint.load_model) tells. Raises UserError."""
    values = {**DEFAULTS, **(values or {})}
    run = meta.get("run", {})
    mapping, train_length = run.get("data", {}).get("task"), run.get("train", {}).get("seq_len")
    if run.get("data", {}).get("reader") != "synthetic" or not mapping:
        raise UserError(
            f"{meta.get('folder', 'The model')} was not trained on a generated task; train one: python train.py experiment=synthetic/parity"
        )
    try:
        task = build_task(mapping)
    except ValueError as error:
        raise UserError(str(error).splitlines()) from error
    print(f"{meta['folder']}\n{HEADING}")
    options = {key: values[key] for key in ("sequences", "seed", "batch", "chunk", "precision")}
    lengths = values["lengths"] or default_lengths(train_length, task)
    return evaluate(model, task, lengths, train_length=train_length, on_progress=lambda row: print(line(row), flush=True), **options)


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Loads, evaluates, writes and returns the report."""
    from data.files import write_json
    from models.checkpoint import load_model
    from training.watch.metrics import environment
    from training.world import pick_device

    device = pick_device(values["device"])
    model, _, meta = load_model(values["checkpoint"], device)
    start = time.perf_counter()
    result = evaluate_checkpoint(model, meta, values)
    report = {
        "suite": "state_tracking",
        "arguments": values,
        "checkpoint": meta["folder"],
        "step": meta.get("state", {}).get("step"),
        **result,
        "seconds": time.perf_counter() - start,
        "environment": environment(device),
    }
    out = Path(values["out"] or Path(meta["folder"]) / "eval-state_tracking.json")
    try:
        write_json(out, report)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}.") from error
    print(f"written to {out}")
    return report


def main_of_words(words: list[str]) -> None:
    """What the command line asks for. Raises UserError."""
    run(parse_arguments(words, DEFAULTS, problems_of))


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, main_of_words, arguments)


if __name__ == "__main__":
    sys.exit(main())
