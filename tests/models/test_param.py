"""What every parametrisation keeps: run on each file of configs/param."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.config import ModelConfig
from models.init import roles
from models.lm import LanguageModel
from training.optim import parameter_groups

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "param"
KINDS: dict[str, dict[str, Any]] = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yaml"))}
MIXERS = {"a": {"type": "attention", "n_heads": 2, "head_dim": 16}, "r": {"type": "rnn", "n_heads": 2}}


def model_of(kind: dict[str, Any], width: int = 32, **more: Any) -> LanguageModel:
    model = LanguageModel(ModelConfig(31, width, 2, ["a", "r"], MIXERS, param=kind, **more))
    model.init_weights(0)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_is_in_one_group_and_is_decayed_alike(name: str, tied: bool) -> None:
    model = model_of({**KINDS[name], **({"base_width": 16} if "base_width" in KINDS[name] else {})}, tie_embeddings=tied)
    groups = parameter_groups(model, 0.1)
    assert sorted(n for group in groups for n in group["names"]) == sorted(n for n, _ in model.named_parameters())
    for group in groups:
        assert {roles(p).get("rate", 1.0) for p in group["params"]} == {group.get("lr_ratio", 1.0)}
        assert group["weight_decay"] in (0.0, 0.1 / group.get("lr_ratio", 1.0))


@pytest.mark.parametrize("name", KINDS)
def test_the_model_trains_and_decodes(name: str) -> None:
    model = model_of(KINDS[name])
    ids = torch.arange(20).view(2, 10)
    output = model(ids, labels=ids)
    assert output.loss_sum is not None and torch.isfinite(output.loss_sum)
    state, last = model.init_state(2), None
    for t in range(10):
        out = model(ids[:, t : t + 1], state=state)
        state, last = out.state, out.logits
    assert last is not None
    torch.testing.assert_close(last[:, -1], model(ids).logits[:, -1], atol=1e-5, rtol=1e-4)
