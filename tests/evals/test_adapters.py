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
from evals.adapters.own import OwnAdapter
from evals.cures.setting import Setting
from evals.cures.state import restart
from evals.measures.position import position_curve
from models.config import ModelConfig
from models.generate import generate
from models.lm import LanguageModel
from models.sampling import Sampling
from models.session import Session
from tests.evals.conftest import HF, VOCABULARY, loud, own_adapter
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


def test_a_learned_table_may_have_places_more_than_it_says() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    adapter = HFAdapter(OPTForCausalLM(config).eval(), None, "opt", "opt")
    assert adapter.position_limit == 64
    adapter.prefill(torch.ones(1, 64, dtype=torch.long), 16)
    with pytest.raises(ItemError, match="64 positions"):
        adapter.prefill(torch.ones(1, 65, dtype=torch.long), 16)


def test_a_cache_that_is_right_of_one_row_alone_is_noticed() -> None:
    """RWKV's in transformers: of several rows a single token comes back as many."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    config = RwkvConfig(hidden_size=32, attention_hidden_size=32, intermediate_size=48, **HF)
    adapter = HFAdapter(loud(RwkvForCausalLM(config)), None, "rwkv", "rwkv")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, 40)))
    for _ in range(4):
        ids = torch.cat([ids, whole_logits(adapter, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(adapter.greedy(ids[:, :40], 4, 16), ids[:, 40:])


def test_a_head_with_a_soft_cap_is_not_called_apart() -> None:
    """Small logits it changes by less than a thousandth, so that those of seven tokens can look the same."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
        final_logit_softcapping=30.0, **HF,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    assert 0.01 < float(model(torch.arange(7)[None]).logits.abs().max()) < 1
    assert not HFAdapter(model, None, "gemma2", "gemma2").split_head


def stretched(kind: str) -> Adapter:
    """A model whose rotary frequencies follow the length of what is read, beyond 32 tokens."""
    if kind == "own":
        attention = {"type": "attention", "n_heads": 2, "rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 32}}
        model = LanguageModel(ModelConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, pattern=["a"], mixers={"a": attention}))
        model.init_weights(0)
        return OwnAdapter(loud(model, 0.4), None, kind, kind)
    from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "pad_token_id": 0, **HF}
    if kind == "dynamic":
        config = LlamaConfig(max_position_embeddings=32, rope_parameters={"rope_theta": 10000.0, **DYNAMIC}, **sizes)
        return HFAdapter(loud(LlamaForCausalLM(config), 0.4), None, kind, kind)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
    config = Phi3Config(
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
        **sizes,
    )
    return HFAdapter(loud(Phi3ForCausalLM(config), 0.4), None, kind, kind)


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize("kind", ["own", "dynamic", "longrope"])
def test_positions_that_stretch_with_a_text_are_those_of_the_text(kind: str) -> None:
    """Whatever chunks it is asked to be read in, and whatever was read before."""
    adapter, rng = stretched(kind), np.random.default_rng(0)
    assert adapter.carry == "chunks" and adapter.whole_beyond == 32
    for length in (90, 50, 32, 9, 50):
        ids = torch.from_numpy(rng.integers(0, VOCABULARY, (2, length + 1)))
        fresh = stretched(kind)
        expected = F.cross_entropy(whole_logits(fresh, ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        found: list[torch.Tensor] = []

        def each(first: int, nll: torch.Tensor, state: Any, found: list[torch.Tensor] = found) -> None:
            found.append(nll)

        adapter.stream(ids, 7, each)
        torch.testing.assert_close(torch.cat(found, 1).double(), expected, atol=1e-4, rtol=1e-4)
        logits = adapter.prefill(ids[:, :-1], 7)[0]
        torch.testing.assert_close(logits.double(), whole_logits(fresh, ids[:, :-1])[:, -1], atol=1e-4, rtol=1e-4)
    assert adapter.describe()["carry"] == "chunks up to 32 tokens, else none"
    with pytest.raises(ItemError, match="chunks beyond 32 tokens, where its positions stretch, and 40,000"):
        adapter.check_length(40_000)
    with restart(adapter, Setting(8, 90, np.zeros((1, 9), np.int64), 8)):
        with pytest.raises(ItemError, match="acts between chunks, and 90 tokens"):
            adapter.stream(torch.zeros(1, 91, dtype=torch.long), 8, lambda first, nll, state: None)


def test_a_prompt_that_stretches_positions_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.session.CHUNK", 5)
    model: Any = stretched("own").model
    for length in (12, 50):
        ids = torch.from_numpy(np.random.default_rng(length).integers(0, VOCABULARY, (1, length)))
        first = Session(model, ids).generate(1, Sampling(temperature=0))[0, 0]
        assert int(first) == int(model(ids).logits[0, -1].argmax())


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
