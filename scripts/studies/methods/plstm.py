"""pLSTM: state tracking by the form of its transition, and cost.

    python -m scripts.studies.methods.plstm          # a quarter of an hour on one core; docs/results/methods/plstm.json

One layer of width 64 learns the parity of bits, and products of the group S3, in 16 tokens, and is scored at 16 and at 64. A model that solves the
latter at 64 ends there; the others are given the full number of steps. Runs that the JSON holds already are not run again.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from data.synthetic import build_task
from models.mixers.plstm import Mixer
from scripts.studies.methods.common import accuracy, arguments, batches, cost, model_of, train, write

T, FAR = 16, 64
TASKS: dict[str, dict[str, Any]] = {"parity": {"name": "parity"}, "s3": {"name": "word_problem", "group": "s3"}}
ARMS: dict[str, dict[str, Any]] = {
    "orthogonal": {"transition": 4, "orthogonal": True},
    "diagonal": {"transition": 4, "orthogonal": False},
    "positive": {"transition": 4, "orthogonal": True},  # no diagonal below zero, no rotation: transitions as of gates
}


def gates(mixer: Mixer, rates: torch.Tensor) -> torch.Tensor:
    """Transitions without their key lines: diagonals between 0 and 1."""
    rates = rates.unflatten(-1, (mixer.H, -1)) + mixer.transition_bias.to(rates.dtype)
    return torch.diag_embed(torch.sigmoid(5 * rates[..., : mixer.J]))


def arm(task: str, name: str, seed: int, most: int) -> dict[str, Any]:
    mapping = TASKS[task]
    model = model_of({"type": "plstm", "n_heads": 4, **ARMS[name]}, len(build_task(mapping).vocabulary()))
    changed = mock.patch.object(Mixer, "transitions", gates) if name == "positive" else nullcontext()
    with changed:
        draw = batches(build_task(mapping), T, 64, seed)
        steps, curve = train(
            model, draw, most, seed=seed, lr=3e-3 if task == "s3" else 1e-2, solved=lambda model: accuracy(model, mapping, FAR, 128) > 0.99
        )
        scores = {length: accuracy(model, mapping, length) for length in (T, FAR)}
    return {"task": task, "arm": name, "seed": seed, "steps": steps, "accuracy": scores, "loss": curve}


def main() -> None:
    given = arguments(__doc__, "plstm", ("tracking", "cost"))
    if "tracking" in given.wanted:
        found = json.loads(given.out.read_text()).get("tracking", []) if given.out.exists() else []
        held = {(run["task"], run["arm"], run["seed"]) for run in found}
        for seed in range(given.seeds):
            for task, most in (("parity", 600), ("s3", 2000)):
                for name in ARMS if task == "parity" else ("orthogonal", "diagonal"):
                    if (task, name, seed) in held:
                        continue
                    found.append(arm(task, name, seed, 1000 if (task, name) == ("s3", "diagonal") else most))
                    write(given.out, tracking=found)
                    print(found[-1], flush=True)
    if "cost" in given.wanted:
        write(given.out, cost=cost({"type": "plstm", "n_heads": 4}))


if __name__ == "__main__":
    main()
