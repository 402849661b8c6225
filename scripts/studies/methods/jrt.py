"""JRT-RNN: whether two sets are disjoint, by which of them comes first; and cost.

    python -m scripts.studies.methods.jrt            # a quarter of an hour on one core; docs/results/methods/jrt.json

Three layers of width 64 whose two heads have 13 features (queries and keys of width 3) read a set of 2 symbols and one of 30, in one order or the
other, and say at the end which symbol they have in common, or that they have none. A recurrence has to keep the first set until the
second comes; one that has read both before it begins does not care which is first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.studies.methods.common import arguments, cost, model_of, train, write

SYMBOLS, SHORT, LONG = 48, 2, 30
SEP, ASK, NONE = range(SYMBOLS, SYMBOLS + 3)
PROMPT = SHORT + LONG + 1  # all but the question
ARMS: dict[str, dict[str, Any]] = {"causal": {"prompt": 0}, "jrt": {"prompt": PROMPT}}


def sets(rows: int, seed: int, step: int, order: str) -> tuple[Tensor, Tensor]:
    """(ids, labels) (rows, PROMPT + 1): the answer at the question is the only label. order: short first, or long first."""
    draw = np.random.default_rng([seed, step])
    shuffled = draw.permuted(np.tile(np.arange(SYMBOLS), (rows, 1)), axis=1)
    short, long = shuffled[:, :SHORT], shuffled[:, SHORT : SHORT + LONG].copy()
    shared, rows_R = draw.random(rows) < 0.5, np.arange(rows)
    common = short[rows_R, draw.integers(0, SHORT, rows)]
    place = draw.integers(0, LONG, rows)
    long[rows_R, place] = np.where(shared, common, long[rows_R, place])
    mark = np.full((rows, 1), SEP)
    first, second = (short, long) if order == "short first" else (long, short)
    ids = np.concatenate([first, mark, second, mark + 1], 1)
    labels = np.full_like(ids, -100)
    labels[:, -1] = np.where(shared, common, NONE)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def disjoint(mapping: dict[str, Any], order: str, seed: int, steps: int = 400) -> dict[str, Any]:
    model = model_of({"type": "jrt", "n_heads": 2, "feature_dim": 3, **mapping}, SYMBOLS + 3, layers=3, d_ff=128)

    @torch.no_grad()
    def right(rows: int = 512) -> float:
        ids, labels = sets(rows, seed + 10**6, 0, order)
        return round(float((model.eval()(ids).logits[:, -1].argmax(-1) == labels[:, -1]).float().mean()), 4)

    taken, curve = train(model, lambda step: sets(64, seed, step, order), steps, seed=seed, lr=3e-3, solved=lambda _: right() > 0.99)
    return {"seed": seed, "order": order, "steps": taken, "accuracy": right(2048), "loss": curve}


def main() -> None:
    given = arguments(__doc__, "jrt")
    if "sets" in given.only or not given.only:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
        for seed in range(given.seeds):
            for order in ("long first", "short first"):
                for name, mapping in ARMS.items():
                    found[name].append(disjoint(mapping, order, seed))
                    write(given.out, sets=found)
                    print(name, found[name][-1], flush=True)
    if "cost" in given.only or not given.only:
        write(
            given.out, cost={name: cost({"type": "jrt", "n_heads": 4, "prompt": p}) for name, p in (("causal", 0), ("prompt of 128", 128))}
        )


if __name__ == "__main__":
    main()
