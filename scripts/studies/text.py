"""Windows of real text for studies, and one short training on them: the shards of `python -m data.prepare`, AdamW, a cosine, held-out nats.

text = Text(Path("runs/data/demo"), length=64, device=device)
losses = text.train(model, steps=400, rows=16, rate=3e-3, seed=0)
nats = text.held_out(model, windows=64)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import UserError
from data.shards import ShardSet
from models.lm import LanguageModel
from scripts.studies.trainer import Trainer
from training.schedule import lr_factor


class Text:
    """The tokens of a folder of shards; length: tokens of a window."""

    def __init__(self, folder: Path, length: int, device: torch.device) -> None:
        self.train_set, self.valid_set, self.length, self.device = ShardSet(folder, "train"), ShardSet(folder, "valid"), length, device
        self.vocab_size = -(-self.train_set.vocab_size // 64) * 64

    def windows(self, split: ShardSet, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """(ids, labels), (R, length) each, of the windows that begin at `starts`."""
        rows = torch.from_numpy(split.rows(starts, self.length + 1)[0]).to(self.device)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, rows: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Windows drawn at random, a function of seed and step."""
        draw = np.random.default_rng([seed, step])
        return self.windows(self.train_set, draw.integers(0, self.train_set.n_tokens - self.length - 1, rows))

    def train(
        self,
        model: LanguageModel,
        *,
        steps: int,
        rows: int,
        rate: float,
        seed: int,
        batches: Callable[[int], tuple[Tensor, Tensor]] | None = None,
        warmup: float = 0.1,
        kind: str = "cosine",
        weight_decay: float = 0.1,
        bf16: bool = False,
        graph: bool = True,
        each: Callable[[int, float], bool] | None = None,
    ) -> list[float]:
        """Losses in nats a token. Training is told how far it is (`LanguageModel.follow`), and ends early where each(step, loss) says so."""
        trainer = Trainer(model, self.device, lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay, bf16=bf16)
        step = trainer.graph(lambda ids, labels: trainer.update(ids, labels)[:2])
        step.why_not = step.why_not or ("" if graph else "not wanted")
        losses: list[Tensor] = []
        draw = batches or (lambda number: self.batch(rows, seed, number))

        def inputs(number: int) -> tuple[Tensor, ...]:
            if model.follow(number / steps):
                step.graph, step.calls = None, 0
            return draw(number)

        def rate_of(number: int) -> float:
            return rate * lr_factor(number, steps, kind=kind, warmup=round(warmup * steps), final=0.1)

        for number, (loss, _) in trainer.run(step, range(steps), rate_of, inputs):
            with trainer.here():  # elsewhere it would be read while the step is still at work
                losses.append(loss.clone())
                ended = each is not None and each(number, float(losses[-1]))
            if ended:
                break
        with trainer.here():  # waits for the last step, so that the weights are whole
            return [round(loss, 5) for loss in torch.stack(losses).tolist()]

    @torch.no_grad()
    def held_out(self, model: LanguageModel, windows: int = 64) -> float:
        """Nats a token over windows spread evenly over the held-out text."""
        training = model.training
        model.eval()
        starts, nats, count = np.linspace(0, self.valid_set.n_tokens - self.length - 1, windows).astype(np.int64), 0.0, 0
        for some in np.array_split(starts, math.ceil(windows / 32)):
            ids, labels = self.windows(self.valid_set, some)
            loss = model(ids, labels=labels).loss_sum
            assert loss is not None
            nats, count = nats + float(loss), count + labels.numel()
        model.train(training)
        return nats / count


def device_of(name: str) -> torch.device:
    """auto, cpu or cuda. Raises UserError where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here; take --device cpu.")
    return torch.device("cuda" if name == "cuda" or name == "auto" and torch.cuda.is_available() else "cpu")
