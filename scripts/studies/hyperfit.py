"""Hyperfitting, small: a model trained on text, then on a few of its windows until it knows them by heart; repetition and loss before and after.

python -m scripts.studies.hyperfit --data runs/data/demo --out docs/results/methods/hyperfitting.json

Arms after the same first training: hyperfit (`--few` windows again and again until the loss of a step is below `--stop`), and as many steps at the same
rate on fresh windows, which tells the few windows from the further training.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import UserError
from data.files import write_json
from evals.adapters.own import OwnAdapter
from evals.measures.repetition import CONTEXT, WRITTEN, repetition
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.options import refuse
from scripts.studies.text import Text, device_of
from training.watch.metrics import environment

SHOWN = ("type_token_ratio", "repeated_4", "entropy", "nats_per_token", "citation")


def measured(model: LanguageModel, text: Text, seed: int, prompts: int) -> dict[str, Any]:
    draw = np.random.default_rng([seed, 1])
    starts = draw.integers(0, text.valid_set.n_tokens - CONTEXT - WRITTEN, prompts)
    ids_RL = text.valid_set.rows(starts, CONTEXT + WRITTEN)[0]
    training = text.train_set.read(0, text.train_set.n_tokens)
    result = repetition(OwnAdapter(model, None, "study", ""), ids_RL, batch=prompts, training=training)
    model.train()
    return result


def run(text: Text, seed: int, given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is measured after the first training and after each arm."""
    mixers = {"attention": {"type": "attention", "n_heads": given.width // 32}}
    model = LanguageModel(ModelConfig(text.vocab_size, given.width, given.layers, mixers=mixers))
    model.init_weights(seed)
    text.train(model, steps=given.steps, rows=given.rows, rate=3e-3, seed=seed, bf16=True)
    found: dict[str, dict[str, Any]] = {"trained": measured(model, text, seed, given.prompts)}
    few = text.batch(given.few, seed, 10**6)
    rows = torch.arange(given.few)

    def again(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The few windows in another order each time round."""
        a = step * given.rows % given.few
        order = rows[np.random.default_rng([seed, step * given.rows // given.few]).permutation(given.few)][a : a + given.rows].to(
            few[0].device
        )
        return few[0][order], few[1][order]

    steps = 0
    for name, batches in (("hyperfit", again), ("as many steps on fresh text", None)):
        arm, recent = copy.deepcopy(model), list[float]()

        def each(step: int, loss: float, recent: list[float] = recent, name: str = name) -> bool:
            recent.append(loss)
            return name == "hyperfit" and len(recent) >= 10 and statistics.mean(recent[-10:]) < given.stop

        losses = text.train(
            arm, steps=steps or given.most, rows=given.rows, rate=given.rate, seed=seed + 100, batches=batches, warmup=0.0,
            kind="constant", weight_decay=0.0, bf16=True, each=each,
        )  # fmt: skip
        steps = steps or len(losses)
        found[name] = {**measured(arm, text, seed, given.prompts), "steps": len(losses), "last_loss": losses[-1]}
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("runs/data/demo"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000, help="of the first training")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--few", type=int, default=64, help="windows to know by heart")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--stop", type=float, default=0.05, help="nats a token")
    parser.add_argument("--most", type=int, default=2000, help="steps, if the loss stays above")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from here")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    given = parser.parse_args(arguments)
    refuse(parser, given, ["width", "layers", "steps", "rows", "length", "few", "rate", "stop", "most", "prompts", "seeds"])
    if given.few % given.rows or given.width % 32:
        parser.error(f"--few must be a multiple of --rows {given.rows}, and --width one of 32; not {given.few} and {given.width}.")
    try:
        device = device_of(given.device)
        text = Text(given.data, given.length, device)
    except UserError as error:
        sys.exit(str(error))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    settings = {key: value for key, value in vars(given).items() if key not in ("out", "data", "device")}
    results: dict[str, Any] = {"settings": settings, "device": name, "environment": environment(device), "seeds": []}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        results["seeds"].append(run(text, seed, given))
        for arm, row in results["seeds"][-1].items():
            print(f"seed {seed} {arm:28} " + "  ".join(f"{key} {row[key]:.3f}" for key in SHOWN), flush=True)
        write_json(given.out, results)


if __name__ == "__main__":
    main()
