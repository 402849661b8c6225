"""Gradient noise on a model that starts badly: held-out loss with and without it; JSON to --out.

python -m scripts.studies.grad_noise --data runs/data/demo --out docs/results/methods/gradient_noise.json    # six minutes on one core

All hidden matrices start at zero, so that the gradients of each are zero as long as the next one's are: without noise nothing but embedding and head
can learn, and the model stays one of pairs of tokens. Arms: this start without and with noise, and the usual start.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data.errors import UserError
from data.files import write_json
from models.config import ModelConfig
from models.init import is_hidden_matrix
from models.lm import LanguageModel
from scripts.studies.text import Text
from scripts.studies.trainer import Trainer
from training.wrappers import grad_noise

ARMS = {"zero start": (True, 0.0), "zero start, noise": (True, 1.0), "usual start": (False, 0.0), "usual start, noise": (False, 1.0)}


def with_noise(trainer: Trainer, eta: float, seed: int) -> None:
    """Gives a study's trainer the noise that a run's engine gives its optimizer."""
    parameters = dict(trainer.model.named_parameters())
    engine: Any = SimpleNamespace(parameters=parameters, optimizer=trainer.optimizer, stage=0, steps_taken=0)
    engine.config = SimpleNamespace(seed=seed, train=SimpleNamespace(grad_clip=trainer.grad_clip))
    engine.norm_now = lambda: float(torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None]))
    grad_noise.wrap(engine, grad_noise.Config(eta=eta))
    adds = trainer.optimizer.before_step

    def before_step() -> None:
        if adds is not None:
            adds()
        engine.steps_taken += 1

    trainer.optimizer.before_step = before_step


def arm(text: Text, zero: bool, eta: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    mixers = {"attention": {"type": "attention", "n_heads": 4}}
    model = LanguageModel(ModelConfig(text.vocab_size, given.width, given.layers, mixers=mixers))
    model.init_weights(seed)
    if zero:
        for parameter in filter(is_hidden_matrix, model.parameters()):
            torch.nn.init.zeros_(parameter)
    losses = text.train(
        model, steps=given.steps, rows=8, rate=3e-3, seed=seed, graph=False, prepare=lambda trainer: with_noise(trainer, eta, seed)
    )
    hidden = max(float(p.detach().abs().max()) for p in model.parameters() if is_hidden_matrix(p))
    return {"seed": seed, "held_out": round(text.held_out(model), 4), "last": losses[-1], "largest_hidden": hidden}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("runs/data/demo"))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    try:
        text = Text(given.data, 64, torch.device("cpu"))
    except UserError as error:
        sys.exit(str(error))
    settings = {key: getattr(given, key) for key in ("width", "layers", "steps", "seeds")}
    results: dict[str, Any] = {"settings": settings, "device": "cpu", "arms": {}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (zero, eta) in ARMS.items():
        rows = [arm(text, zero, eta, seed, given) for seed in range(given.seeds)]
        results["arms"][name] = rows
        print(f"{name:20} held out {statistics.mean(row['held_out'] for row in rows):.4f}  {[row['held_out'] for row in rows]}", flush=True)
        write_json(given.out, results)


if __name__ == "__main__":
    main()
