"""States and retention of the delta rule as the evals read them."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

from data.tokenizer import byte_tokenizer, coder_of
from evals.adapters.base import ItemError
from evals.adapters.own import OwnAdapter
from evals.cures.attention import lambda_mask
from evals.cures.hooks import measure_retention
from evals.cures.options import suitable
from evals.cures.scan import dt_scaling, retention, window
from evals.cures.setting import Setting
from evals.measures.states import state_curve
from kernels.delta_rule.reference import delta_rule_sequential
from models.config import ModelConfig
from models.lm import LanguageModel
from tests.evals.conftest import VOCABULARY


def test_retention_and_effective_rank() -> None:
    mixers: dict[str, Any] = {"p": {"type": "delta", "n_heads": 2, "updates": 2, "negative": True}, "d": {"type": "delta", "gate": False}}
    model = LanguageModel(ModelConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, pattern=["p", "d"], mixers=mixers))
    model.init_weights(0)
    adapter = OwnAdapter(model, coder_of(byte_tokenizer()), "own", "own")
    rows = np.random.default_rng(0).integers(1, VOCABULARY, (2, 70))
    curve = state_curve(adapter, rows, 32, chunk=16)
    last = curve["snapshots"][-1]["states"]
    assert [s["name"] for s in last] == ["delta", "delta"] and all(1 <= r <= 16 for s in last for r in s["effective_rank"])
    with measure_retention(adapter) as found:
        adapter.advance(torch.from_numpy(rows), adapter.start(2))
    assert set(found.totals) == {(0, "delta"), (0, "delta_update"), (1, "delta"), (1, "delta_update")}
    assert (found.totals[0, "delta"] < 0).all() and not found.totals[1, "delta"].any() and (found.totals[1, "delta_update"] < 0).all()
    assert all(n == 70 for n in found.tokens.values())
    gates, updates = (
        next(r["eigenvalues"] for r in curve["retention"] if (r["layer"], r["name"]) == (0, n)) for n in ("delta", "delta_update")
    )
    assert all(0 < a <= m <= z <= 1 for a, m, z in zip(gates["lowest"], gates["mean"], gates["highest"])) and gates["negative"] == [0, 0]
    assert all(-1 < a < 0 < z < 1 for a, z in zip(updates["lowest"], updates["highest"])) and all(0 < n < 1 for n in updates["negative"])
    plain = next(r["eigenvalues"] for r in curve["retention"] if (r["layer"], r["name"]) == (1, "delta_update"))
    assert min(plain["lowest"]) > 0 and not any(plain["negative"])


def test_eigenvalues_of_updates_are_those_of_their_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written down of retention beside the matrices themselves."""
    adapter = gated_model({**DELTA, "negative": True})
    seen = tensors_of_the_rule(monkeypatch)
    with measure_retention(adapter) as found:
        adapter.advance(IDS, adapter.start(2))
    _, k, _, beta, g = (t.double() for t in seen[:5])
    k = torch.nn.functional.normalize(k, dim=-1)
    updates = torch.eye(k.shape[-1]).double() - beta[..., None, None] * k[..., :, None] * k[..., None, :]
    values = torch.linalg.eigvalsh(updates)
    odd = torch.where((values[..., -1] - 1).abs() > 1e-5, values[..., -1], values[..., 0])  # the one that is not 1
    spread = found.spread[0, "delta_update"].figures()
    torch.testing.assert_close(torch.tensor(spread["lowest"]).double(), odd.amin((0, 1)), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(spread["mean"]).double(), odd.mean((0, 1)), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(spread["negative"]).double(), (odd < 0).double().mean((0, 1)))
    left = torch.linalg.slogdet(updates)[1].sum(1) / k.shape[-1]
    torch.testing.assert_close(found.totals[0, "delta_update"], left, rtol=1e-4, atol=1e-4)
    gates = found.spread[0, "delta"].figures()
    torch.testing.assert_close(torch.tensor(gates["mean"]).double(), g.exp().mean((0, 1)), rtol=1e-5, atol=1e-6)


def gated_model(mixer: dict[str, Any], **values: Any) -> OwnAdapter:
    model = LanguageModel(ModelConfig(vocab_size=VOCABULARY, d_model=32, n_layers=1, pattern=["d"], mixers={"d": mixer}, **values))
    model.init_weights(0)
    return OwnAdapter(model, coder_of(byte_tokenizer()), "own", "own")


DELTA: dict[str, Any] = {"type": "delta", "n_heads": 2, "updates": 2, "dt_min": 0.1, "dt_max": 0.9}
IDS = torch.from_numpy(np.random.default_rng(1).integers(1, VOCABULARY, (2, 41)))


def tensors_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the mixer's rules will be called with, one after the other."""
    module = sys.modules["models.mixers.delta"]
    given: list[torch.Tensor] = []
    original = module.delta_rule

    def watched(*tensors: Any, **options: Any) -> Any:
        given.extend(tensors)
        return original(*tensors, **options)

    monkeypatch.setattr(module, "delta_rule", watched)
    return given


def cured(adapter: OwnAdapter, cure: Any, pieces: tuple[int, ...]) -> torch.Tensor:
    """The matrix states after the ids, read in pieces of these lengths, under the cure."""
    state = adapter.start(2)
    with cure:
        for piece in IDS.split(list(pieces), 1):
            state = adapter.advance(piece, state)
    return state.layers[0].delta_BHVK


@pytest.mark.parametrize("gate", [True, False])
def test_cures_of_the_delta_rule_against_the_loop(gate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention and step sizes, in one piece and token by token, beside the rule one update at a time with changed gates and strengths."""
    adapter = gated_model({**DELTA, "gate": gate})
    given = tensors_of_the_rule(monkeypatch)
    adapter.advance(IDS, adapter.start(2))
    q, k, v, beta = (t.double() for t in given[:4])
    g = given[4].double() if gate else beta.new_zeros(2, 41, 2)
    monkeypatch.undo()
    setting = Setting(train_length=16, total_length=41, calibration_RT=IDS.numpy(), chunk=16)
    for cure, b, change in (
        (retention(adapter, setting, m=0.9, b=0.5), 0.5, g + math.log(0.9)),
        (dt_scaling(adapter, setting, c=0.5), 1.0, 0.5 * g),
    ):
        wanted = delta_rule_sequential(q, k, v, b * beta, change, normalize=True)[1]
        torch.testing.assert_close(cured(adapter, cure, (41,)).double(), wanted, rtol=1e-4, atol=1e-5)
    cure = retention(adapter, setting, m=0.9, b=0.5)
    whole = cured(adapter, cure, (41,))
    again = cured(adapter, retention(adapter, setting, m=0.9, b=0.5), (38, 1, 1, 1))
    torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)
    assert "window" not in {c.name for c in suitable(adapter)} and ("dt" in {c.name for c in suitable(adapter)}) == gate
    with pytest.raises(ItemError, match="no Mamba-2 scan"), window(adapter, setting):
        pass


def test_the_lambda_mask_keeps_the_output_gate_and_norms_over_heads() -> None:
    attention = {"type": "attention", "n_heads": 2, "output_gate": True, "qk_norm": True, "qk_norm_over": "heads"}
    adapter = gated_model(attention)
    setting = Setting(train_length=16, total_length=41, calibration_RT=IDS.numpy(), chunk=16)
    with torch.no_grad():
        plain = adapter.model(IDS).logits
        with lambda_mask(adapter, setting, first=0, local=100):  # which hides nothing
            torch.testing.assert_close(adapter.model(IDS).logits, plain, rtol=1e-4, atol=1e-5)
