"""NaN and infinity stay in their document, and no tokens at all are no error: every mixer in training, prefill and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import mixers
from models.config import ModelConfig
from models.decode import fixed
from models.lm import LanguageModel, LMState

MAMBA = {"type": "mamba2", "head_dim": 8, "d_state": 8}
ATTENTIONS: list[dict[str, Any]] = [
    {"n_heads": 4, "n_kv_heads": 2},
    {"n_heads": 4, "window": 3},
    {"n_heads": 4, "window": 30, "qk_norm": True},
]
MIXERS: list[dict[str, Any]] = [MAMBA, {**MAMBA, "n_groups": 2}, *({"type": "attention", **a} for a in ATTENTIONS)]
CELLS: list[dict[str, Any]] = [
    {"type": "rnn"},
    {"type": "rnn", "cell": "paralstm"},
    {"type": "rnn", "cell": "gru", "d_conv": 0, "gate": False},
]
LENGTHS = (7, 9, 8)


def built(mapping: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    mixer = mixers.build(mapping, 32, 0)
    mixer.init_weights(0.1, 0)
    return mixer


def documents() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(inputs; the same with NaN and infinity in the second document; segments; which tokens are of the others)."""
    segments = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS)).expand(2, -1)
    x = torch.randn(2, sum(LENGTHS), 32)
    bad = x.clone()
    bad[:, 9], bad[:, 10] = torch.nan, torch.inf
    return x, bad, segments, segments[0] != 2


@pytest.mark.parametrize("mapping", MIXERS, ids=str)
def test_training(mapping: dict[str, Any]) -> None:
    mixer = built(mapping)
    x, bad, segments, others = documents()
    d = torch.randn_like(x)
    leaf, lost = x.clone().requires_grad_(), bad.clone().requires_grad_()
    y, beside_lost = (mixer(t, None, segments)[0] for t in (leaf, lost))
    torch.testing.assert_close(beside_lost[:, others], y[:, others])
    assert beside_lost[:, 9:11].isnan().all()
    (wanted,) = torch.autograd.grad(y, leaf, d, retain_graph=True)
    (got,) = torch.autograd.grad(beside_lost, lost, d)
    torch.testing.assert_close(got[:, others], wanted[:, others])
    d[:, 12] = torch.nan  # a gradient that is not finite
    (got,) = torch.autograd.grad(y, leaf, d)
    torch.testing.assert_close(got[:, others], wanted[:, others])
    assert got[:, 12].isnan().any()


@pytest.mark.parametrize("mapping", [*MIXERS, *CELLS], ids=str)
def test_decoding(mapping: dict[str, Any]) -> None:
    """Token by token; the steps that start a document are the ones that must forget."""
    mixer = built(mapping)
    x, bad, segments, others = documents()
    with torch.no_grad():
        runs = []
        for inputs in (x, bad):
            state, parts = mixer.init_state(2), []
            for t in range(x.shape[1]):
                y, state = mixer(inputs[:, t : t + 1], state, segments[:, t : t + 1])
                parts.append(y)
            runs.append(torch.cat(parts, 1))
    assert runs[1][:, 9].isnan().any()
    torch.testing.assert_close(runs[1][:, others], runs[0][:, others])


@pytest.mark.parametrize("mapping", [m for m in MIXERS if m["type"] == "attention"], ids=str)
def test_a_fixed_cache(mapping: dict[str, Any]) -> None:
    """What a step of constant shape reads from a cache that holds an earlier document's NaN."""
    mixer = built(mapping)
    x, bad, segments, _ = documents()
    model: Any = type("Model", (), {"visits": lambda _: [type("Block", (), {"mixer": mixer})]})()
    with torch.no_grad():
        runs = []
        for inputs in (x, bad):
            _, state = mixer(inputs[:, :18], mixer.init_state(2), segments[:, :18])
            state = fixed(model, LMState([state]), 32).layers[0]
            runs.append(torch.cat([mixer(x[:, t : t + 1], state, None)[0] for t in (18, 19)], 1))
    assert runs[1].isfinite().all()
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("mapping", [*MIXERS, *CELLS], ids=str)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_no_tokens(mapping: dict[str, Any], carried: bool, packed: bool) -> None:
    mixer = built(mapping)
    x = torch.randn(2, 0, 32, requires_grad=True)
    state = mixer.init_state(2) if carried else None
    segments = torch.zeros(2, 0, dtype=torch.long) if packed else None
    y, after = mixer(x, state, segments)
    assert y.shape == (2, 0, 32)
    for g in torch.autograd.grad(y.sum(), (x, *mixer.parameters())):
        assert not g.any()
    with torch.no_grad():
        more = torch.randn(2, 3, 32)
        if carried:
            torch.testing.assert_close(mixer(more, after, None)[0], mixer(more, state, None)[0])
        assert mixer(x.detach(), state, segments)[0].shape == (2, 0, 32)


def test_a_model_of_no_tokens() -> None:
    layers = {"g": CELLS[0], "m": MAMBA, "a": {"type": "attention", "n_heads": 4}}
    model = LanguageModel(ModelConfig(64, 32, 3, ["g", "m", "a"], layers, learnable_residual=True))
    model.init_weights(0)
    ids = torch.zeros(2, 0, dtype=torch.long)
    output = model(ids, labels=ids, segment_ids=ids)
    assert output.token_count == 0 and output.loss_sum == 0
    (output.loss_sum + output.z_loss_sum).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        empty = model(ids, state=model.init_state(2), last_only=True)
        more = torch.randint(0, 64, (2, 5))
        assert empty.logits is not None and empty.logits.shape == (2, 0, 64)
        torch.testing.assert_close(model(more, state=empty.state).logits, model(more, state=model.init_state(2)).logits)
