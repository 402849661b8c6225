"""Gradient noise on a deep model that starts badly: loss with and without it; JSON to --out.

python -m scripts.studies.grad_noise --out docs/results/methods/gradient_noise.json    # some minutes on one core

All hidden matrices start at zero. The gradient of each is then zero as long as the next one's weights are, and without noise nothing but embedding and
head can learn. The task is to name the token two back, of which these know nothing: a guess among 16 costs ln 16 = 2.77 nats. Arms: this start
without and with noise, and the usual start.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data.files import write_json
from models.config import ModelConfig
from models.init import is_hidden_matrix
from models.lm import LanguageModel
from scripts.studies.options import refuse
from scripts.studies.trainer import Trainer
from training.schedule import lr_factor
from training.watch.metrics import environment
from training.wrappers import grad_noise

TOKENS, BACK = 16, 2
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


def arm(zero: bool, eta: float, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    mixers = {"attention": {"type": "attention", "n_heads": 2}}
    model = LanguageModel(ModelConfig(TOKENS, given.width, given.layers, mixers=mixers))
    model.init_weights(seed)
    if zero:
        for parameter in filter(is_hidden_matrix, model.parameters()):
            torch.nn.init.zeros_(parameter)
    trainer = Trainer(model, torch.device("cpu"), lr=given.rate, betas=(0.9, 0.95), weight_decay=0.0)
    with_noise(trainer, eta, seed)
    draw, losses = torch.Generator().manual_seed(seed), list[float]()
    for step in range(given.steps):
        trainer.rate.set(given.rate * lr_factor(step, given.steps, kind="cosine", warmup=given.steps // 20, final=0.1))
        ids = torch.randint(TOKENS, (16, 24), generator=draw)
        labels = torch.cat([torch.full((16, BACK), -100), ids[:, :-BACK]], 1)
        losses.append(float(trainer.update(ids, labels)[0]))
    hidden = max(float(p.detach().abs().max()) for p in model.parameters() if is_hidden_matrix(p))
    tail = losses[-max(1, given.steps // 20) :]
    curve = [round(statistics.mean(losses[i : i + 50]), 4) for i in range(0, given.steps, 50)]
    return {"seed": seed, "loss": round(statistics.mean(tail), 4), "largest_hidden": hidden, "curve": curve}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    refuse(parser, given, ["width", "layers", "steps", "rate", "seeds"])
    settings = {key: getattr(given, key) for key in ("width", "layers", "steps", "rate", "seeds")}
    results: dict[str, Any] = {"settings": settings, "device": "cpu", "environment": environment(torch.device("cpu")), "arms": {}}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (zero, eta) in ARMS.items():
        rows = [arm(zero, eta, seed, given) for seed in range(given.seeds)]
        results["arms"][name] = rows
        print(f"{name:20} loss {statistics.mean(row['loss'] for row in rows):.4f}  {[row['loss'] for row in rows]}", flush=True)
        write_json(given.out, results)


if __name__ == "__main__":
    main()
