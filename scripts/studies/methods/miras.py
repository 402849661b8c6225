"""Miras: what outliers among the values cost with each loss, gradients taken at an older memory, and the cost of the three published rows.

    python -m scripts.studies.methods.miras          # twenty minutes on one core; docs/results/methods/miras.json

One layer of width 64 with a matrix memory that decays learns associative recall (four pairs of 32 symbols in 32 tokens). Then 5 % of the values that
its memory is given are made ten times as large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from data.synthetic import build_task
from models.mixers import miras
from scripts.studies.methods.common import accuracy, arguments, batches, cost, model_of, train, write

TASK = {"name": "mqar", "pairs": 4, "symbols": 32}
T = 32
LOSSES: dict[str, dict[str, Any]] = {
    "l2": {"loss": "l2"},
    "huber": {"loss": "huber"},
    "lp 1.5": {"loss": "lp", "p": 1.5},
    "lp 3, lq": {"loss": "lp", "p": 3.0, "retention": "lq"},
}
ROWS: dict[str, dict[str, Any]] = {
    "miras": {},
    "moneta": {"memory": "mlp", "loss": "lp", "retention": "lq"},
    "yaad": {"memory": "mlp", "loss": "huber"},
    "memora": {"memory": "mlp", "retention": "kl"},
}


@contextmanager
def outliers(share: float = 0.05, times: float = 10.0, seed: int = 0) -> Iterator[None]:
    """Inside, that share of the values given to memories is made so many times as large, by draws from `seed`."""
    plain, draw = miras.miras_gradient, torch.Generator().manual_seed(seed)

    def disturbed(weights: list[Tensor], k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
        hit = torch.rand(len(v), 1, 1, 1, generator=draw) < share
        return plain(weights, k, torch.where(hit, times * v, v), *rest)

    with mock.patch.object(miras, "miras_gradient", disturbed):
        yield


def recall_error(mapping: dict[str, Any], seed: int, share: float = 0.05) -> float:
    """Mean square error, relative to the values, of a memory without training read at its 24 keys of width 32, after twelve rounds of them in which
    that share of the values is ten times as large."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(24, 32, generator=draw), torch.randn(24, 32, generator=draw)
    keys = keys / keys.norm(dim=1, keepdim=True)
    W, limit = torch.zeros(1, 1, 32, 32), torch.ones(1, 1, 1, 1)
    for _ in range(12):
        for n in torch.randperm(24, generator=draw).tolist():
            v = values[n] * (10.0 if float(torch.rand((), generator=draw)) < share else 1.0)
            slope = miras.miras_gradient(
                [W], keys[n][None, None, :, None], v[None, None, :, None], mapping["loss"], mapping.get("p", 2.0), limit
            )
            W = W - 0.3 * slope[0]
    return float((keys @ W[0, 0].T - values).square().mean() / values.square().mean())


def recall(mapping: dict[str, Any], seed: int, steps: int = 300) -> dict[str, Any]:
    """Accuracies of a model trained without outliers: without and with them; and of one that was trained with them."""
    model = model_of({"type": "miras", "n_heads": 4, **mapping}, 32)
    taken, curve = train(model, batches(build_task(TASK), T, 64, seed), steps, seed=seed)
    clean = accuracy(model, TASK, T)
    with outliers(seed=seed):
        disturbed = accuracy(model, TASK, T)
        train(model, batches(build_task(TASK), T, 64, seed), steps, seed=seed)
        learnt = accuracy(model, TASK, T)
    return {"seed": seed, "steps": taken, "clean": clean, "outliers": disturbed, "trained with outliers": learnt, "loss": curve}


def main() -> None:
    given = arguments(__doc__, "miras", ("memory", "recall", "chunk", "cost"))
    if "memory" in given.wanted:
        errors = {
            name: {f"{share}": [round(recall_error(m, seed, share), 4) for seed in range(given.seeds)] for share in (0.0, 0.05)}
            for name, m in LOSSES.items()
            if "lq" not in name  # this memory has no norm to hold it
        }
        write(given.out, memory={"what": "relative squared error of a memory by the share of outliers, a number a seed", "errors": errors})
        print(errors)
    if "recall" in given.wanted:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in LOSSES}
        for seed in range(given.seeds):
            for name, mapping in LOSSES.items():
                found[name].append(recall(mapping, seed))
                write(given.out, recall={"task": TASK, "T": T, "found": found})
                print(name, found[name][-1], flush=True)
    if "chunk" in given.wanted:
        chunks = {c: [recall({"loss": "l2", "chunk": c}, seed)["clean"] for seed in range(given.seeds)] for c in (1, 16)}
        write(given.out, chunk={"what": "accuracy without outliers by chunk", "accuracy": chunks})
        print(chunks)
    if "cost" in given.wanted:
        write(given.out, cost={name: cost({"type": "miras", "n_heads": 4, **mapping}, times=2) for name, mapping in ROWS.items()})


if __name__ == "__main__":
    main()
