"""Gradient noise: its schedule, its sizes, what it depends on, and that none is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.lm import LanguageModel
from scripts.studies.grad_noise import with_noise
from scripts.studies.trainer import Trainer
from tests.conftest import run_program, run_ranks
from tests.models.test_param import model_of
from training.wrappers import grad_noise
from training.zero.local_state import Piece


def test_the_schedule_is_the_papers() -> None:
    config = grad_noise.Config(eta=0.3, gamma=0.55)
    for t in (0, 1, 9, 999):
        assert abs(grad_noise.sigma(config, t) ** 2 - 0.3 / (1 + t) ** 0.55) < 1e-12


def test_noise_is_normal_and_each_pieces_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_noise, "CHUNK", 1000)

    def drawn(first: int, count: int, seed: int = 0, step: int = 0, index: int = 0) -> torch.Tensor:
        return grad_noise.noise(Piece("w", 25_500, first, count, 0), index, seed, step, torch.device("cpu"))

    whole = drawn(0, 25_500)
    assert abs(float(whole.mean())) < 0.03 and abs(float(whole.std()) - 1) < 0.02
    for first, count in ((0, 999), (1, 3), (999, 2), (12_345, 5_000), (25_000, 500)):
        assert torch.equal(drawn(first, count), whole[first : first + count])
    for other in (drawn(0, 25_500, seed=1), drawn(0, 25_500, step=1), drawn(0, 25_500, index=1)):
        assert abs(float((whole * other).mean())) < 0.03


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("grad_scale", [None, torch.tensor(4.0)])
def test_the_optimizer_reads_gradients_with_noise_of_its_size(relative: bool, grad_scale: torch.Tensor | None) -> None:
    weight = torch.nn.Parameter(torch.zeros(300, 300))
    weight.grad = torch.full_like(weight, 0.01)
    engine: Any = SimpleNamespace(parameters={"w": weight}, stage=0, steps_taken=3, norm_now=lambda: 3.0)
    engine.config = SimpleNamespace(seed=1, train=SimpleNamespace(grad_clip=1.0))
    engine.optimizer = SimpleNamespace(grad_scale=grad_scale, param_groups=[{"params": [weight]}])
    grad_noise.wrap(engine, grad_noise.Config(eta=0.5, relative=relative))
    engine.optimizer.before_step()
    read = (weight.grad - 0.01) / (1.0 if grad_scale is None else grad_scale)
    expected = (0.5 / 4**0.55) ** 0.5 * (1 / 300 if relative else 1)
    assert abs(float(read.std()) / expected - 1) < 0.02


def _losses(eta: float | None) -> list[float]:
    model: LanguageModel = model_of({"type": "standard"})
    trainer = Trainer(model, torch.device("cpu"), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    if eta is not None:
        with_noise(trainer, eta, 0)
    ids = torch.arange(24).view(2, 12)
    return [float(trainer.update(ids, ids)[0]) for _ in range(4)]


def test_none_is_bit_equal_and_some_is_not() -> None:
    assert _losses(0.0) == _losses(None)
    assert _losses(0.1) == _losses(0.1) != _losses(None)


def test_a_model_that_starts_at_zero_learns_by_noise_alone() -> None:
    """The paper's claim, small: hidden matrices that start at zero stay there without noise."""
    largest = {}
    for eta in (0.0, 1.0):
        model = model_of({"type": "standard"})
        hidden = [p for n, p in model.named_parameters() if "mlp" in n]
        for p in hidden:
            torch.nn.init.zeros_(p)
        trainer = Trainer(model, torch.device("cpu"), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
        with_noise(trainer, eta, 0)
        ids = torch.arange(24).view(2, 12)
        for _ in range(5):
            trainer.update(ids, ids)
        largest[eta] = max(float(p.detach().abs().max()) for p in hidden)
    assert largest[0.0] == 0 and largest[1.0] > 0.01


def test_ranks_and_zero_stages_change_no_noise(demo_shards: Path, tmp_path: Path) -> None:
    arguments = ["-m", "tests.training.noise_ranks", str(demo_shards), str(tmp_path)]
    for done in (run_program(arguments), run_ranks(2, arguments)):
        assert done.returncode == 0, done.stderr
    alone = load_file(tmp_path / "weights-1-0.safetensors")
    assert any((alone[name] - quiet).abs().max() > 1e-3 for name, quiet in load_file(tmp_path / "quiet.safetensors").items())
    for stage in range(4):
        found = load_file(tmp_path / f"weights-2-{stage}.safetensors")
        assert found.keys() == alone.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor, alone[name], atol=2e-6, rtol=1e-5, msg=lambda text, n=name, s=stage: f"stage {s}, {n}: {text}"
            )
