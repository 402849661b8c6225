"""What the studies of single methods share: a small model of one mixer, its training on a generated task, and its cost beside a plain model.

Legend: B rows, T tokens of a row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import write_json
from data.sources import Source
from data.synthetic import Draws, Task, build_task
from models.config import ModelConfig
from models.contract import tensor_bytes
from models.lm import LanguageModel
from scripts.studies.options import refuse
from training.optim import build_optimizer
from training.watch.metrics import environment

PLAIN = {"type": "attention", "n_heads": 4}
Batches = Callable[[int], tuple[Tensor, Tensor]]  # number of the step: (ids, labels), (B, T)


def model_of(
    mixer: dict[str, Any], vocabulary: int, *, width: int = 64, layers: int = 1, d_ff: int = 0, std: float = 0.125
) -> LanguageModel:
    """A model of `layers` blocks with this mixer; its weights are yet to be drawn."""
    return LanguageModel(ModelConfig(vocabulary, width, layers, ["x"], {"x": mixer}, d_ff=d_ff, init_std=std))


def batches(task: Task, T: int, rows: int, seed: int, split: str = "train") -> Batches:
    """Rows of a generated task, drawn from (seed, split, step) alone."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = task.sample(Draws(seed, split, np.arange(step * rows, (step + 1) * rows)), T)
        return torch.from_numpy(inputs), torch.from_numpy(labels)

    return draw


def demo_bytes(most: int = 2_000_000) -> tuple[np.ndarray, np.ndarray]:
    """(bytes to train on, held-out bytes) of the demo corpus, as int64."""
    whole = np.frombuffer("\n\n".join(Source("demo")).encode(), dtype=np.uint8)[:most].astype(np.int64)
    cut = len(whole) * 9 // 10
    return whole[:cut], whole[cut:]


def text_batches(whole: np.ndarray, T: int, rows: int, seed: int) -> Batches:
    """Windows of a text and the bytes that follow, drawn from (seed, step)."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        at = np.random.default_rng([seed, step]).integers(0, len(whole) - T - 1, rows)
        both = torch.from_numpy(whole[at[:, None] + np.arange(T + 1)])
        return both[:, :-1], both[:, 1:]

    return draw


def train(
    model: LanguageModel, draw: Batches, steps: int, *, seed: int, lr: float = 3e-3, solved: Callable[[LanguageModel], bool] | None = None
) -> tuple[int, list[float]]:
    """AdamW with a short warm-up on `draw(step)`; (steps taken, mean loss of each tenth). solved: asked every hundred steps whether to end."""
    model.init_weights(seed)
    optimizer, losses = build_optimizer(model, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01), []
    base, step = [group["lr"] for group in optimizer.param_groups], 0
    while step < steps:
        for group, rate in zip(optimizer.param_groups, base):
            group["lr"] = rate * min(1.0, (step + 1) / 50)
        ids, labels = draw(step)
        output = model.train()(ids, labels)
        loss = output.loss_sum / output.token_count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        step += 1
        if solved is not None and step % 100 == 0 and solved(model):
            break
    tenth = max(1, len(losses) // 10)
    return step, [round(float(np.mean(losses[a : a + tenth])), 4) for a in range(0, len(losses), tenth)]


@torch.no_grad()
def accuracy(model: LanguageModel, mapping: dict[str, Any], T: int, rows: int = 256, seed: int = 0) -> float:
    """Share of right answers on held-out rows of the task."""
    ids, labels = batches(build_task(mapping), T, rows, seed, "valid")(0)
    right = (model.eval()(ids).logits.argmax(-1) == labels)[labels != -100]
    return round(float(right.float().mean()), 4)


def cost(mixer: dict[str, Any], *, T: int = 256, rows: int = 4, width: int = 64, layers: int = 2, times: int = 5) -> dict[str, Any]:
    """A training step and a decoded token of a small model, with this mixer and with attention, in turns: medians in ms, ratios, bytes of state."""
    models = {name: model_of(m, 256, width=width, layers=layers, d_ff=-1) for name, m in (("method", mixer), ("attention", PLAIN))}
    ids = torch.randint(256, (rows, T), generator=torch.Generator().manual_seed(0))
    spent: dict[str, list[float]] = {f"{name} {what}": [] for name in models for what in ("step", "token")}
    states = {}
    for model in models.values():
        model.init_weights(0)
    for _ in range(times + 1):
        for name, model in models.items():
            began = time.perf_counter()
            model.zero_grad()
            output = model(ids, ids)
            assert output.loss_sum is not None
            output.loss_sum.backward()
            spent[f"{name} step"].append(time.perf_counter() - began)
            with torch.no_grad():
                state = states[name] = model(ids, state=model.init_state(rows)).state
                began = time.perf_counter()
                for t in range(8):
                    state = model(ids[:, t : t + 1], state=state).state
                spent[f"{name} token"].append((time.perf_counter() - began) / 8)
    ms = {name: round(1e3 * float(np.median(values[1:])), 3) for name, values in spent.items()}
    return {
        "ms": ms,
        "step_ratio": round(ms["method step"] / ms["attention step"], 2),
        "token_ratio": round(ms["method token"] / ms["attention token"], 2),
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "state_bytes_after_T": {name: tensor_bytes(states[name].layers) // rows for name in models},
        "T": T, "rows": rows, "width": width, "layers": layers, "threads": torch.get_num_threads(),
    }  # fmt: skip


def write(out: Path, **results: Any) -> None:
    """Adds these results to the JSON at `out`, with the machine that they come from."""
    before = json.loads(out.read_text()) if out.exists() else {}
    write_json(out, {**before, **results, "environment": environment(torch.device("cpu"))})


def parser_of(description: str | None, name: str) -> argparse.ArgumentParser:
    """--out, by default docs/results/methods/NAME.json, --seeds and --only (a part of the study)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"docs/results/methods/{name}.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="the parts of the study whose names contain this")
    return parser


def settled(parser: argparse.ArgumentParser, parts: Sequence[str], above_zero: Sequence[str] = ()) -> argparse.Namespace:
    """What was given, with `wanted`, those of the study's parts that --only leaves; the folder of --out is made. Ends the program where none is left, or
    a number that must be above zero is not."""
    given = parser.parse_args()
    given.wanted = [part for part in parts if given.only in part]
    if not given.wanted:
        parser.error(f"--only: no part's name contains {given.only!r}; they are {', '.join(parts)}.")
    refuse(parser, given, ["seeds", *above_zero])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    return given


def arguments(description: str | None, name: str, parts: Sequence[str]) -> argparse.Namespace:
    return settled(parser_of(description, name), parts)
