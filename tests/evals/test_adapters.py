"""Adapters against transformers' own loops: losses, carried state, greedy decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from evals.adapters.base import Adapter, ItemError, pieces
from evals.adapters.hf import HFAdapter
from evals.adapters.load import load_adapter
from evals.measures.position import position_curve
from models.generate import generate
from tests.evals.conftest import VOCABULARY, own_adapter
from training.errors import UserError


def whole_logits(adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return adapter.model(ids).logits.double()


@pytest.mark.parametrize("name", ["llama", "mamba2", "own"])
def test_perplexity_equals_a_plain_loop(adapters: dict[str, Adapter], name: str) -> None:
    adapter, rows = adapters[name], np.random.default_rng(0).integers(0, VOCABULARY, (5, 98))
    assert adapter.carry == "chunks"
    nats = 0.0
    for row in torch.from_numpy(rows):
        nats += float(F.cross_entropy(whole_logits(adapter, row[None, :-1])[0], row[1:], reduction="sum"))
    for chunk, batch in ((17, 3), (1000, 5), (2, 2)):
        result = position_curve(adapter, rows, chunk=chunk, batch=batch)
        assert result["nats_per_token"] * 5 * 97 == pytest.approx(nats, rel=1e-4) and result["tokens"] == 5 * 97
        assert sum(b["nats_per_token"] * b["tokens"] for b in result["buckets"]) == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "mamba2", "own"])
def test_teacher_forced_scoring_equals_greedy_generation_on_200_samples(adapters: dict[str, Adapter], name: str) -> None:
    adapter, rng, right = adapters[name], np.random.default_rng(1), 0
    for _ in range(4):
        prompt = torch.from_numpy(rng.integers(1, VOCABULARY, (50, 31)))
        if isinstance(adapter, HFAdapter):
            model: Any = adapter.model
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None
            )[:, 31:]
        else:
            written = generate(adapter.model, prompt, 5, temperature=0)[:, 31:]
        assert torch.equal(adapter.greedy(prompt, 5, 8), written)
        answer = written.clone()
        for row in range(0, 50, 2):  # half of the answers are wrong in one place, and some are shorter
            place = rng.integers(0, 5)
            answer[row, place] = (answer[row, place] + 1) % VOCABULARY
        answer[::5, 4] = -100
        expected = ((answer == written) | (answer == -100)).all(1)
        assert torch.equal(adapter.hits(prompt, answer, 7), expected)
        right += int(expected.sum())
    assert 60 < right < 140


def test_a_long_sequence_in_chunks_equals_the_whole_one() -> None:
    adapter = own_adapter("mg", d_model=16, n_layers=2)
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, VOCABULARY, (1, 65537)))
    found: list[np.ndarray] = []
    adapter.stream(ids, 4099, lambda first, nll, state: found.append(nll.numpy()))
    with torch.no_grad():
        whole = adapter.model(ids[:, :-1], labels=ids[:, 1:], reduction="none").token_nll.numpy()
    np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=2e-4)
    assert abs(np.concatenate(found, 1).mean() - whole.mean()) < 1e-6


def test_pieces_cover_everything_once_and_leave_no_single_token() -> None:
    for T in range(2, 60):
        for chunk in (1, 2, 3, 7, 100):
            cuts = list(pieces(T, chunk))
            assert cuts[0][0] == 0 and cuts[-1][1] == T and all(a[1] == b[0] for a, b in zip(cuts, cuts[1:]))
            assert all(b - a > 1 for a, b in cuts)


class Forgetful(torch.nn.Module):
    """A model of somebody's own whose cache is broken: it returns one and ignores it."""

    base_model_prefix = "body"

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, past_key_values: Any = None) -> Any:
        return self.inner(input_ids, use_cache=use_cache)


def test_a_broken_cache_is_noticed(adapters: dict[str, Adapter]) -> None:
    adapter = HFAdapter(Forgetful(adapters["llama"].model), None, "x", "x")
    assert adapter.carry == "none" and not adapter.split_head
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (2, 50))
    expected = position_curve(adapters["llama"], rows, chunk=9)["nats_per_token"]
    assert position_curve(adapter, rows, chunk=9)["nats_per_token"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ItemError, match="cannot carry"):
        adapter.check_length(1 << 20)


def test_hard_position_limits_are_found() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    )
    adapter = HFAdapter(gpt2.eval(), None, "gpt2", "gpt2")
    assert adapter.position_limit == 64
    with pytest.raises(ItemError, match="64 positions"):
        adapter.prefill(torch.zeros(1, 65, dtype=torch.long), 16)


def test_states_are_found_and_can_be_replaced(adapters: dict[str, Adapter]) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 40)))
    shapes = {"mamba2": [(4, 128), (4, 128)], "own": [(4, 128), (1, 32)], "llama": []}
    for name, expected in shapes.items():
        adapter = adapters[name]
        state = adapter.advance(ids, adapter.start(2))
        states = adapter.layer_states(state)
        assert [tuple(s.entries.shape[1:]) for s in states] == expected
        if expected:
            halved = adapter.replace_states(state, lambda layer, which, x: x / 2)
            for before, after in zip([s.entries.clone() for s in states], adapter.layer_states(halved)):
                scale = 1.0 if isinstance(adapter, HFAdapter) else 0.5  # a cache is changed in place, and `before` shares it
                torch.testing.assert_close(after.entries, before * scale)


def test_folders_are_loaded_or_refused_in_a_sentence(hf_folder: Path, tmp_path: Path) -> None:
    adapter = load_adapter(str(hf_folder))
    assert adapter.coder is not None and adapter.coder.decode(adapter.coder.encode("a 12")) == "a 12" and adapter.train_length == 4096
    with pytest.raises(UserError, match="There is no"):
        load_adapter(str(tmp_path / "x"))
    with pytest.raises(UserError, match="holds no config.json"):
        load_adapter(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-like-it"}))
    with pytest.raises(UserError, match="holds neither model.safetensors"):
        load_adapter(str(tmp_path))
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        load_adapter(str(tmp_path))
