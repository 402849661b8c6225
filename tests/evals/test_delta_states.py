"""States and retention of the delta rule as the evals read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data.tokenizer import byte_tokenizer, coder_of
from evals.adapters.own import OwnAdapter
from evals.cures.hooks import measure_retention
from evals.measures.states import state_curve
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
