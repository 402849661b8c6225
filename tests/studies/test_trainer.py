"""The studies' trainer against a loop written out, alone and taking turns with another; and evaluations train nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.trainer import Trainer
from tests.conftest import ROOT

STEPS = 5


def model(seed: int) -> LanguageModel:
    mixers: dict[str, dict[str, Any]] = {"g": {"type": "rnn"}, "a": {"type": "attention", "n_heads": 2}}
    new = LanguageModel(ModelConfig(vocab_size=16, d_model=16, n_layers=2, pattern=["g", "a"], mixers=mixers, d_ff=0))
    new.init_weights(seed)
    return new


def batches(seed: int) -> Tensor:
    """(STEPS, 3, 9) ids."""
    return torch.randint(16, (STEPS, 3, 9), generator=torch.Generator().manual_seed(seed))


def rate(number: int) -> float:
    return 1e-2 / (number + 1)


def by_hand(seed: int) -> tuple[list[tuple[float, float]], list[Tensor]]:
    """(loss, gradient norm) of each step and the weights at the end, without the trainer."""
    net, rows = model(seed), []
    decayed = [p for p in net.parameters() if p.ndim >= 2 and "no_decay" not in getattr(p, "roles", ())]
    plain = [p for p in net.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.99), fused=True
    )
    for number, ids in enumerate(batches(seed)):
        for group in optimizer.param_groups:
            group["lr"] = rate(number)
        output = net(ids[:, :-1], labels=ids[:, 1:])
        loss = output.loss_sum / output.token_count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm()
        for p in net.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.5 / float(norm))
        optimizer.step()
        rows.append((float(loss), float(norm)))
    return rows, [p.detach() for p in net.parameters()]


def start(seed: int) -> tuple[Trainer, Iterator[tuple[int, tuple[Tensor, ...]]]]:
    """A trainer, and the generator of its steps."""
    trainer = Trainer(model(seed), torch.device("cpu"), lr=1.0, betas=(0.9, 0.99), weight_decay=0.1, grad_clip=0.5, bf16=True)
    data = batches(seed)
    step = trainer.graph(lambda ids_BT: trainer.update(ids_BT[:, :-1], ids_BT[:, 1:])[:2])
    return trainer, trainer.run(step, range(STEPS), rate, lambda number: (data[number],))


@pytest.mark.parametrize("together", [False, True], ids=["alone", "in-turns"])
def test_steps_are_those_of_a_loop_written_out(together: bool) -> None:
    trainers = [start(seed) for seed in ((0, 1) if together else (0,))]
    rows: list[list[tuple[float, float]]] = [[] for _ in trainers]
    for turn in zip(*(steps for _, steps in trainers)):
        for seen, (number, (loss, norm)) in zip(rows, turn):
            assert number == len(seen)
            seen.append((float(loss), float(norm)))
    for seed, ((trainer, _), seen) in enumerate(zip(trainers, rows)):
        expected, weights = by_hand(seed)
        assert len(seen) == STEPS and torch.allclose(torch.tensor(seen), torch.tensor(expected), rtol=1e-5)
        for p, q in zip(trainer.model.parameters(), weights):
            torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)


def test_evaluations_train_nothing_and_read_no_script() -> None:
    for path in sorted((ROOT / "evals").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            wrong = [
                n for n in names if n.split(".")[0] in ("scripts", "train") or n in ("training.optim", "training.schedule", "torch.optim")
            ]
            assert not wrong, f"{path} imports {wrong}"
            assert not (isinstance(node, ast.Attribute) and node.attr == "backward"), f"{path} takes gradients"
