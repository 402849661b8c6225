"""State tracking and recall: accuracy of a model on generated tasks, by length, up to many times the training length.

    python -m evals.state_tracking checkpoint=runs/parity-paragru [lengths=100,400,1600] [sequences=1000] [seed=0] [batch=64] [chunk=512]
                                   [device=auto] [precision=fp32] [out=FILE]

The task is the one the checkpoint was trained on. Samples come from the evaluation streams, which training of no seed draws from. Long
sequences are fed in chunks with carried state. The result is printed and written as JSON (default: eval-state_tracking.json beside the weights).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from data.files import save_report
from data.synthetic import build_task
from data.synthetic.task import SEED_BITS
from evals.measures.tracking import HEADING, accuracy_by_length, default_lengths, line
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
    """`accuracy_by_length` with the task and training length that a checkpoint's meta tells (see load_model); prints a line a length.

    Raises UserError where the checkpoint was not trained on a generated task.
    """
    values = {**DEFAULTS, **(values or {})}
    run = meta.get("run", {})
    mapping, train_length = run.get("data", {}).get("task"), run.get("train", {}).get("seq_len")
    if run.get("data", {}).get("reader") != "synthetic" or not mapping:
        raise UserError(
            f"{meta.get('folder', 'The model')} was not trained on a generated task; train one: python train.py experiment=synthetic/parity"
        )
    task = build_task(mapping)
    print(f"{meta['folder']}\n{HEADING}")
    options = {key: values[key] for key in ("sequences", "seed", "batch", "chunk", "precision")}
    lengths = values["lengths"] or default_lengths(train_length, task)
    return accuracy_by_length(
        model, task, lengths, train_length=train_length, on_progress=lambda row: print(line(row), flush=True), **options
    )


def run(values: dict[str, Any]) -> dict[str, Any]:
    """Loads the checkpoint, measures it, writes the report as JSON and returns it. Raises UserError."""
    from evals.adapters.load import device_of
    from models.checkpoint import load_model
    from training.watch.metrics import environment

    device = device_of(values["device"])
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
    save_report(out, report)
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
