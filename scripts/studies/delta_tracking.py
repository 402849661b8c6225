"""State tracking of the delta rule on a CPU: the word problem over S3 by updates a token and by the sign of their eigenvalues; JSON to --out.

python -m scripts.studies.delta_tracking --out docs/results/delta_rule/state_tracking.json             # one seed, fifteen minutes on one core
python -m scripts.studies.delta_tracking --out tracking.json --group s5 --updates 1,2,3,4 --seeds 3    # another group, more arms

One layer of width 64, four heads of 16, trained on 16 factors and scored at 16, 32 and 64 (four times as many). The arm that is expected to succeed
(two updates with eigenvalues from -1) runs first and ends when it is solved; the others are given twice its steps, so that their failure is not one of
time. Two updates are two reflections, of which a rotation is made; one update, or eigenvalues from 0, have no rotations (arXiv 2502.10297).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import write_json
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.options import refuse

GROUPS = {"s3": (3, False), "s4": (4, False), "a5": (5, True), "s5": (5, False)}  # (things, even permutations only)
LENGTH, BATCH, CHECK = 16, 128, 100


def table(group: str) -> Tensor:
    """Products (elements, elements): row g, column h is h after g."""
    things, even = GROUPS[group]
    elements = [
        p for p in itertools.permutations(range(things)) if not even or sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0
    ]
    place = {p: i for i, p in enumerate(elements)}
    return torch.tensor([[place[tuple(h[i] for i in g)] for h in elements] for g in elements])


def problem(products: Tensor, rows: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Elements (B, T) and the products so far."""
    ids = torch.randint(len(products), (rows, length), generator=draw)
    so_far = [ids[:, 0]]
    for t in range(1, length):
        so_far.append(products[so_far[-1], ids[:, t]])
    return ids, torch.stack(so_far, 1)


def model_of(elements: int, updates: int, negative: bool, gate: bool) -> LanguageModel:
    mixer = {"type": "delta", "n_heads": 4, "head_dim": 16, "updates": updates, "negative": negative, "gate": gate}
    settings: dict[str, Any] = {"vocab_size": elements, "d_model": 64, "n_layers": 1, "d_ff": 0, "init_std": 0.125}
    return LanguageModel(ModelConfig(**settings, pattern=["delta"], mixers={"delta": mixer}))


@torch.no_grad()
def scores(model: LanguageModel, products: Tensor) -> dict[str, dict[str, float]]:
    """Accuracy over all positions and of the last answer, by length."""
    out = {}
    for length in (LENGTH, 2 * LENGTH, 4 * LENGTH):
        ids, wanted = problem(products, 256, length, torch.Generator().manual_seed(10**6 + length))
        right = (model(ids).logits.argmax(-1) == wanted).float()
        out[str(length)] = {"all": round(right.mean().item(), 4), "last": round(right[:, -1].mean().item(), 4)}
    return out


def arm(group: str, updates: int, negative: bool, gate: bool, seed: int, most: int) -> dict[str, Any]:
    """Trains one model for `most` steps, or until it is solved at four times the length."""
    torch.manual_seed(seed)
    products, began = table(group), time.monotonic()
    model = model_of(len(products), updates, negative, gate)
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    draw, curve, solved = torch.Generator().manual_seed(seed + 1), [], False
    step = 0
    while step < most and not solved:
        for group_ in optimizer.param_groups:  # a short rise
            group_["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        ids, wanted = problem(products, BATCH, LENGTH, draw)
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), wanted.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % CHECK == 0:
            now = scores(model, products)
            curve.append(
                {"step": step, "loss": round(loss.item(), 4), "accuracy": now[str(LENGTH)]["all"], "far": now[str(4 * LENGTH)]["all"]}
            )
            solved = now[str(4 * LENGTH)]["all"] > 0.98
            print(group, updates, negative, seed, curve[-1], flush=True)
    return {
        "group": group, "updates": updates, "negative": negative, "gate": gate, "seed": seed, "steps": step, "solved": solved,
        "seconds": round(time.monotonic() - began, 1), "scores": scores(model, products), "chance": round(1 / len(products), 4), "curve": curve,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group", choices=[*GROUPS], default="s3")
    parser.add_argument("--updates", default="1,2", help="updates a token to try besides eigenvalues from 0")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500, help="the most steps of the arm that is to succeed")
    parser.add_argument("--gate", action="store_true", help="with the forgetting gate")
    given = parser.parse_args()
    refuse(parser, given, ["seeds", "steps"])
    try:
        tried = sorted({int(n) for n in given.updates.split(",")}, reverse=True)
    except ValueError:
        tried = [0]
    if tried[-1] < 1 or tried[0] > 16:
        parser.error(f"--updates takes numbers from 1 to 16 such as 1,2, not {given.updates}.")
    try:
        results: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.exists() else []
        there = isinstance(results, list)
    except (OSError, ValueError):
        there = False
    if not there:
        parser.error(f"--out {given.out} is there and holds no results of this study; name another file.")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        most = given.steps
        for place, (updates, negative) in enumerate([*((n, True) for n in tried), (tried[0], False)]):
            results.append(arm(given.group, updates, negative, given.gate, seed, most))
            write_json(given.out, results)
            if not place:
                most = 2 * results[-1]["steps"]


if __name__ == "__main__":
    main()
