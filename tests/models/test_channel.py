"""What every channel mixer keeps: run on each file of configs/channel, so a new one is tested with no edit here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import channel
from models.config import ModelConfig
from models.layers import SwiGLU
from models.lm import LanguageModel

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "channel"
KINDS: dict[str, dict[str, Any]] = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
D, F = 24, 48


@pytest.fixture(params=KINDS)
def mixed(request: pytest.FixtureRequest) -> SwiGLU:
    torch.manual_seed(0)
    built = channel.build(KINDS[request.param], D, F)
    built.init_weights(0.2, 0)
    return built.eval()


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_it_is_a_swiglu_of_its_plain_weights(mixed: SwiGLU) -> None:
    plain = SwiGLU(D, F)
    plain.load_state_dict(mixed.plain_weights())
    torch.testing.assert_close(mixed(x_of()), plain(x_of()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.out(mixed.inner(x_of())), mixed(x_of()), atol=0, rtol=0)


def test_it_counts_the_flops_it_makes(mixed: SwiGLU) -> None:
    for training in (False, True):
        mixed.train(training)
        for part, counted in ((mixed, mixed.flops_per_token()), (mixed.inner, mixed.inner_flops_per_token())):
            with FlopCounterMode(display=False) as counter:
                part(x_of())
            assert counter.get_total_flops() == 14 * counted


def test_every_parameter_is_drawn_and_learns(mixed: SwiGLU) -> None:
    with torch.no_grad():
        for p in mixed.parameters():
            p.fill_(float("nan"))
    mixed.init_weights(0.02, 12)
    spread = mixed.plain_weights()["down.weight"].std().item() / (0.02 / 24**0.5)
    assert 0.5 < spread < 1.2
    mixed.init_weights(0.2, 0)
    mixed.double().train()
    mixed.follow(0.2)
    mixed(x_of(torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mixed.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_recomputation_changes_no_number(name: str) -> None:
    results = []
    for choice in ("none", "swiglu", "mlp", "full"):
        model = LanguageModel(ModelConfig(31, D, 2, mixers={"attention": {"type": "attention", "n_heads": 2}}, d_ff=F, channel=KINDS[name]))
        model.init_weights(0)
        model.set_activation_checkpointing(choice)
        ids = torch.arange(20).view(2, 10)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss_sum
        assert loss is not None
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for found in results[1:]:
        assert len(found) == len(results[0]) and all(torch.equal(a, b) for a, b in zip(found, results[0]))


@pytest.mark.parametrize("name", KINDS)
def test_decoding_is_forward(name: str) -> None:
    model = LanguageModel(
        ModelConfig(31, D, 2, mixers={"attention": {"type": "attention", "n_heads": 2}}, d_ff=F, channel=KINDS[name])
    ).eval()
    model.init_weights(0)
    ids, state = torch.arange(14).view(2, 7), model.init_state(2)
    for t in range(7):
        output = model(ids[:, t : t + 1], state=state)
        state = output.state
    torch.testing.assert_close(output.logits[:, -1], model(ids).logits[:, -1], atol=1e-5, rtol=1e-4)
