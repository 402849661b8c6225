"""JRT-RNN against the formula, what its prompts see and what is scored of them, and sets whose order must not matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Reader
from data.prepare import main as prepare
from data.prompted import IGNORE, PromptReader
from data.shards import ShardSet
from data.synthetic import build_task
from evals.adapters.base import ItemError
from evals.adapters.own import OwnAdapter
from evals.measures.baselines import CountBaselines, baselines
from evals.measures.documents import document_perplexity
from evals.measures.perplexity import evaluate, held_out_rows
from evals.measures.position import position_curve, windows
from evals.measures.tracking import count
from models import mixers
from models.config import ModelConfig
from models.lm import LanguageModel
from models.mixers.jrt import taylor
from models.prompt import told_by_prompt, whole_prompt
from models.sampling import Sampling
from models.session import Session
from scripts.studies.methods.jrt import told_apart
from training.config.cli import checked, compose_config
from training.errors import UserError

D, T, M = 16, 23, 9


def built(prompt: int = M) -> Any:
    torch.manual_seed(0)
    mixer = mixers.build({"type": "jrt", "n_heads": 2, "feature_dim": 4, "prompt": prompt}, D, 0)
    mixer.init_weights(0.5, 0)
    return mixer.double().eval()


def by_formula(mixer: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """One document, token by token, with explicit features."""
    mixed = mixer.conv(torch.nn.functional.linear(x_TD[None], mixer.in_proj.weight), 0, None, None)[1][0]
    q, k, v, k_e, v_e = (part.unflatten(-1, (2, -1)) for part in mixed.split(mixer.widths, -1))
    s = torch.einsum("thf,thv->hfv", taylor(k_e[:M]), v_e[:M])
    z = taylor(k_e[:M]).sum(0)
    out = []
    for i in range(len(x_TD)):
        s = s + taylor(k[i])[..., None] * v[i][:, None]
        z = z + taylor(k[i])
        phi = taylor(q[i])
        out.append(torch.einsum("hf,hfv->hv", phi, s) / (phi * z).sum(-1, keepdim=True))
    return torch.nn.functional.linear(torch.stack(out).flatten(1), mixer.out_proj.weight)


def test_it_is_the_formula_for_every_document() -> None:
    mixer, x = built(), torch.randn(2, T, D, dtype=torch.float64)
    cuts = [[0, T], [0, 4, 16, T]]
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(c) - 1), torch.tensor(c).diff()) for c in cuts])
    y = mixer(x, None, segments)[0]
    for row, borders in enumerate(cuts):
        for a, b in zip(borders, borders[1:]):
            torch.testing.assert_close(y[row, a:b], by_formula(mixer, x[row, a:b]))


def test_a_prompt_in_one_call_then_tokens_one_by_one_is_the_whole() -> None:
    mixer, x = built(), torch.randn(2, T, D, dtype=torch.float64)
    whole, (y, state) = mixer(x)[0], mixer(x[:, :M], mixer.init_state(2))
    parts = [y]
    for t in range(M, T):
        y, state = mixer(x[:, t : t + 1], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_a_prompt_is_seen_whole_and_what_follows_is_causal() -> None:
    mixer, x = built(), torch.randn(1, T, D, dtype=torch.float64)
    y, changed = mixer(x)[0], x.clone()
    changed[:, M - 1] += 1
    assert not torch.allclose(mixer(changed)[0][:, 0], y[:, 0])
    changed = x.clone()
    changed[:, M + 2] += 1
    torch.testing.assert_close(mixer(changed)[0][:, : M + 2], y[:, : M + 2])


class Counting(Reader):
    """Rows 0, 1, 2, ... in documents of fifteen tokens."""

    seq_len = 40

    def samples(self, k_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.tile(np.arange(41, dtype=np.int64), (len(k_R), 1))
        return tokens, (tokens // 15).astype(np.int32)


def test_masked_tokens_are_asked_for_in_prompts_and_next_ones_behind_them() -> None:
    reader, k = PromptReader(Counting(), 10, 0.3, 99, seed=1), np.arange(50)
    inputs, labels, segments = reader.labelled(k)
    plain = np.tile(np.arange(40), (50, 1))
    prompt, masked = plain % 15 < 10, inputs == 99
    assert 0.25 < masked[prompt].mean() < 0.35 and not masked[~prompt].any()
    assert (labels[masked] == plain[masked]).all() and (inputs[~masked] == plain[~masked]).all()
    assert (labels[~prompt] == plain[~prompt] + 1).all()
    told = (plain % 15 < 9) & ~masked
    assert (labels[told] == IGNORE).all() and (labels[(plain % 15 == 9) & ~masked] == 10 + 15 * segments[(plain % 15 == 9) & ~masked]).all()
    assert all((a == b[7:8]).all() for a, b in zip(reader.labelled(k[7:8]), (inputs, labels, segments)))
    assert (told_by_prompt(torch.from_numpy(segments), 10).numpy() == (plain % 15 < 9)).all()


def model_of(prompt: int) -> LanguageModel:
    mixer = {"type": "jrt", "n_heads": 2, "feature_dim": 4, "prompt": prompt}
    model = LanguageModel(ModelConfig(50, D, 2, ["j"], {"j": mixer}, init_std=0.3))
    model.init_weights(0)
    return model


def test_only_what_comes_after_a_prompt_is_scored() -> None:
    adapter, rows = OwnAdapter(model_of(M), None, "jrt", ""), np.random.default_rng(0).integers(0, 50, (3, 65))
    ids = torch.from_numpy(rows)
    with torch.no_grad():
        wanted = adapter.model(ids[:, :-1], ids[:, 1:], reduction="none").token_nll[:, M - 1 :]
    scored: list[tuple[int, torch.Tensor]] = []
    adapter.stream(ids, 4, lambda first, nll, state: scored.append((first, nll)))
    assert scored[0][0] == M - 1
    torch.testing.assert_close(torch.cat([nll for _, nll in scored], 1), wanted, atol=1e-4, rtol=1e-4)
    curve = position_curve(adapter, rows, chunk=8)
    assert curve["tokens"] == wanted.numel() and abs(curve["nats_per_token"] - float(wanted.mean())) < 1e-4
    assert windows(adapter, rows, 32)["by_place"]
    found = document_perplexity(adapter, [(row, 64) for row in rows], chunk=8)
    assert found["tokens"] == wanted.numel() and abs(found["nats_per_token"] - float(wanted.mean())) < 1e-4
    again = document_perplexity(adapter, [*((row, 64) for row in rows), (rows[0, :5], 5)], chunk=8)
    assert again["nats_per_token"] == found["nats_per_token"] and "1 within the prompt of 9 left out" in again["summary"]
    with pytest.raises(ItemError, match="lies within the prompt"):
        document_perplexity(adapter, [(rows[0, :5], 5)])


def test_prompts_of_packed_documents_are_not_cut_by_chunks(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"{i} is a number of some digits"[: 12 + i % 15]}) for i in range(40)))
    assert prepare([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'x'}", "tokenizer=bytes", "valid_fraction=0.5", "workers=1"]) == 0
    mixer = {"type": "jrt", "n_heads": 2, "feature_dim": 4, "prompt": M}
    model = LanguageModel(ModelConfig(257, D, 2, ["j"], {"j": mixer}, init_std=0.3))
    model.init_weights(0)
    found = [evaluate(model, ShardSet(tmp_path / "x", "valid"), length=60, chunk=chunk) for chunk in (60, 11)]
    assert found[0].tokens == found[1].tokens > 0
    assert abs(found[0].nll_nats - found[1].nll_nats) < 1e-4 * found[0].nll_nats
    train, valid = ShardSet(tmp_path / "x", "train"), ShardSet(tmp_path / "x", "valid")
    counted, counts, nats = baselines(train, valid, 60, None, prompt=M), CountBaselines(train), 0.0
    for tokens, segments in held_out_rows(valid, 60, None):
        begins = [0, *(np.flatnonzero(np.diff(segments[:-1])) + 1), len(tokens) - 1]
        for a, b in zip(begins, begins[1:]):
            nats += counts.nll(tokens[a + M - 1 : b + 1])[1] if b - a >= M else 0.0
    assert {(one.tokens, one.bytes) for one in counted.values()} == {(found[0].tokens, found[0].bytes)}
    assert abs(counted["bigram"].nll_nats - nats) < 1e-9 * nats


def test_prompts_of_generated_tasks_are_not_cut_by_chunks() -> None:
    model, task = model_of(M), build_task({"name": "word_problem"})
    whole, cut = (count(model, task, 53, sequences=9, chunk=chunk).to_dict(53) for chunk in (512, 4))
    assert whole == cut


def test_the_prompt_of_a_passkey_is_read_whole() -> None:
    """Longer than the model's own prompts and than a chunk; the answer is what follows the prompt read in one call."""
    adapter, ids = OwnAdapter(model_of(M), None, "jrt", ""), torch.arange(30)[None]
    with torch.no_grad(), whole_prompt(adapter.model, 30):
        wanted = adapter.model(ids).logits[:, -1]
    got, _ = adapter.prefill(ids, chunk=4)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, OwnAdapter(model_of(0), None, "causal", "").prefill(ids, chunk=4)[0], atol=1e-3)


@pytest.mark.parametrize("length", [1, M - 2, M, M + 1, 30])
def test_text_goes_on_from_its_whole_prompt(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a short one is of the prompt as well, and chunks do not cut it."""
    monkeypatch.setattr("models.session.CHUNK", 4)
    drawn: list[torch.Tensor] = []

    def draw(self: Sampling, logits_BV: torch.Tensor, *more: object) -> torch.Tensor:
        drawn.append(logits_BV)
        return logits_BV.argmax(-1)

    monkeypatch.setattr(Sampling, "draw", draw)
    model, ids = model_of(M).eval(), torch.arange(length)[None] % 50
    Session(model, ids).generate(1, Sampling())
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    Session(model, torch.cat([padded, torch.arange(length + 3)[None] % 50]), [length, length + 3]).generate(1, Sampling())
    with torch.no_grad():
        wanted = model(ids).logits[0, -1]
    for logits in drawn:
        torch.testing.assert_close(logits[0], wanted, atol=1e-5, rtol=1e-5)


def test_the_entropy_of_what_is_written_has_not_seen_it() -> None:
    """Behind a context shorter than the model's own prompts: read in one call, the tokens written would all be of the prompt."""
    measure = pytest.importorskip("evals.measures.repetition").repetition
    adapter, rows = OwnAdapter(model_of(M), None, "jrt", ""), np.random.default_rng(0).integers(0, 50, (2, M + 5))
    entropies, context = [], torch.from_numpy(rows[:, : M - 4])
    logits, state = adapter.prefill(context, chunk=64)
    for token in adapter.greedy(context, 9, chunk=64).split(1, dim=1):
        log_p = logits.log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1).mean())
        logits, state = adapter.prefill(token, 64, state)
    assert abs(measure(adapter, rows, context=M - 4)["entropy"] - float(torch.stack(entropies).mean())) < 1e-5


def test_runs_that_could_not_score_what_they_train_are_refused() -> None:
    base = ["model=paragru", "+mixer@model.mixers.jrt=jrt", "model.pattern=[jrt]", "train.seq_len=64", "model.mixers.jrt.prompt=32"]
    assert checked(compose_config(base)).prompt == 32
    for more, words in (
        ("model.mixers.jrt.prompt=64", "leaves nothing"),
        ("data.reader=stream", "windows"),
        ("train.initial_state=pass", "zero"),
    ):
        with pytest.raises(UserError, match=words):
            checked(compose_config([*base, more]))


def test_disjoint_sets_are_told_apart_in_either_order() -> None:
    """What can be read from sums of one size: in one pass it matters which set has to be held, in two it does not."""
    one_pass, twice = ([told_apart(way, first, 0, rows=200) for first in (True, False)] for way in (False, True))
    assert one_pass[0] > 0.99 and one_pass[1] < 0.93
    assert min(twice) > 0.99 and abs(twice[0] - twice[1]) < 1e-3
