"""Perplexity against brute force, baselines against dictionaries, and the two command lines."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data.errors import UserError
from data.shards import ShardSet
from data.tokenizer import byte_tokenizer, coder_of
from evals.adapters.base import ItemError
from evals.inputs.texts import Text
from evals.measures.baselines import DISCOUNT, CountBaselines, baselines
from evals.measures.documents import document_perplexity
from evals.measures.perplexity import bucket_sums, evaluate, held_out_rows, text_bytes
from models.checkpoint import load_model
from models.config import ModelConfig
from models.lm import LanguageModel
from tests.conftest import run_program
from tests.evals.conftest import own_adapter


@pytest.fixture(scope="module")
def model(demo_shards: Path) -> LanguageModel:
    mixers = {
        "g": {"type": "rnn", "n_heads": 2},
        "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
        "a": {"type": "attention", "n_heads": 2},
    }
    built = LanguageModel(ModelConfig(vocab_size=512, d_model=32, n_layers=3, pattern=["g", "m", "a"], mixers=mixers))
    built.init_weights(0)
    return built.eval()


def test_chunked_evaluation_equals_whole_rows_and_brute_force(model: LanguageModel, demo_shards: Path) -> None:
    shards = ShardSet(demo_shards, "valid")
    options = {"length": 100, "max_tokens": 900}
    whole, chunked = evaluate(model, shards, chunk=100, **options), evaluate(model, shards, chunk=17, batch=3, **options)
    assert chunked.nll_nats == pytest.approx(whole.nll_nats, rel=1e-6) and chunked.tokens == whole.tokens == 900
    nats, size = 0.0, 0
    for tokens, segments in held_out_rows(shards, 100, 900):
        for segment in np.unique(segments[:-1]):
            inside = np.flatnonzero(segments[:-1] == segment)
            ids = torch.from_numpy(tokens[inside])[None]
            nats += float(F.cross_entropy(model(ids).logits[0], torch.from_numpy(tokens[inside + 1]), reduction="sum"))
        size += text_bytes(shards, tokens)
    assert whole.nll_nats == pytest.approx(nats, rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_positions_that_stretch_with_a_text_do_not_follow_the_chunks(demo_shards: Path) -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 20}
    mixers = {"a": {"type": "attention", "n_heads": 2, "rope_scaling": scaling}}
    model = LanguageModel(ModelConfig(vocab_size=512, d_model=32, n_layers=2, pattern=["a"], mixers=mixers))
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    shards = ShardSet(demo_shards, "valid")
    for length in (90, 20):
        whole, cut = (evaluate(model, shards, length=length, max_tokens=360, chunk=chunk) for chunk in (length, 7))
        assert cut.nll_nats == pytest.approx(whole.nll_nats, rel=1e-6)


def test_ranks_share_the_rows(model: LanguageModel, demo_shards: Path) -> None:
    shards = ShardSet(demo_shards, "valid")
    whole = evaluate(model, shards, length=64, max_tokens=640)
    parts = [evaluate(model, shards, length=64, max_tokens=640, rank=r, world_size=3) for r in range(3)]
    assert sum(p.tokens for p in parts) == whole.tokens and sum(p.nll_nats for p in parts) == pytest.approx(whole.nll_nats, rel=1e-6)


def test_rows_cover_the_split_once(demo_shards: Path) -> None:
    shards = ShardSet(demo_shards, "valid")
    rows = held_out_rows(shards, 1000, None)
    assert sum(len(t) - 1 for t, _ in rows) == shards.n_tokens - 1
    np.testing.assert_array_equal(np.concatenate([t[1:] for t, _ in rows]), shards.read(1, shards.n_tokens - 1))


def test_buckets() -> None:
    sums: dict[int, list[float]] = {}
    bucket_sums(np.ones((2, 9)), 0, sums)
    assert {low: n for low, (_, n) in sums.items()} == {0: 2, 1: 2, 2: 4, 4: 8, 8: 2}


def test_baselines_against_dictionaries_and_they_are_distributions(demo_shards: Path) -> None:
    train, valid = ShardSet(demo_shards, "train"), ShardSet(demo_shards, "valid")
    counts, tokens = CountBaselines(train), valid.read(0, 400).astype(np.int64)
    stream = train.read(0, train.n_tokens).tolist()
    one, two, context = Counter(stream), Counter(zip(stream, stream[1:])), Counter(stream[:-1])
    followers = Counter(v for v, _ in two)
    V = train.vocab_size

    def p1(w: int) -> float:
        return (one[w] + 1) / (len(stream) + V)

    def p2(v: int, w: int) -> float:
        return (max(two[v, w] - DISCOUNT, 0) + DISCOUNT * followers[v] * p1(w)) / context[v] if context[v] else p1(w)

    ids = tokens.tolist()
    unigram, bigram = counts.nll(tokens)
    assert unigram == pytest.approx(-sum(math.log(p1(w)) for w in ids[1:]))
    assert bigram == pytest.approx(-sum(math.log(p2(v, w)) for v, w in zip(ids, ids[1:])))
    assert sum(p2(ids[5], w) for w in range(V)) == pytest.approx(1.0)


def test_baselines_are_of_the_tokens_that_the_model_is_scored_on(model: LanguageModel, demo_shards: Path) -> None:
    train, valid = ShardSet(demo_shards, "train"), ShardSet(demo_shards, "valid")
    scored, counted = evaluate(model, valid, length=100, max_tokens=900), baselines(train, valid, 100, 900)
    counts, rows = CountBaselines(train), [tokens for tokens, _ in held_out_rows(valid, 100, 900)]
    for i, name in enumerate(("unigram", "bigram")):
        assert (counted[name].tokens, counted[name].bytes) == (scored.tokens, scored.bytes)
        assert counted[name].nll_nats == pytest.approx(sum(counts.nll(tokens)[i] for tokens in rows))
    assert counted["bigram"].bits_per_byte < counted["unigram"].bits_per_byte < scored.bits_per_byte


def test_command_lines(demo_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert (
        run_program(
            ["train.py", "experiment=smoke", "train.device=cpu", f"data.path={demo_shards}", f"run_dir={run}", "train.steps=2"]
        ).returncode
        == 0
    )
    done = run_program(
        ["-m", "evals.run", f"checkpoint={run}", "suite=perplexity", "length=64", "max_tokens=640", f"out={tmp_path / 'r.json'}"]
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert (
        report["tokens"] == 640
        and report["baselines_bits_per_byte"]["bigram"] < report["baselines_bits_per_byte"]["unigram"]
        and "commit" in report["environment"]
    )
    done = run_program(["-m", "scripts.generate", f"checkpoint={run}", "prompt=It was", "max_new_tokens=5", "seed=1"])
    assert done.returncode == 0 and done.stdout.startswith("It was")
    for words, part in (
        (["checkpoint=/nowhere"], "There is no"),
        ([], "checkpoint=DIR"),
        ([f"checkpoint={run}", "suite=x"], "choose one of"),
        ([f"checkpoint={run}", "lenght=3"], "length"),
    ):
        done = run_program(["-m", "evals.run", *words])
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(UserError, match="^The token id 50[0-9] of .* is beyond the 256 tokens of the model"):
        small = LanguageModel(replace(load_model(run)[0].config, vocab_size=256))
        evaluate(small, ShardSet(demo_shards, "valid"), length=64, max_tokens=20_000)
    (tmp_path / "book.txt").write_text("It was")
    done = run_program(["-m", "evals.run", f"checkpoint={run}", f"out={tmp_path / 'book.txt'}"])
    assert done.returncode == 2 and "is not written over" in done.stderr and (tmp_path / "book.txt").read_text() == "It was"
    weights = next((run / "checkpoints").glob("*/model.safetensors"))
    tensors = load_file(weights)
    tensors["norm.weight"].fill_(float("nan"))
    save_file(tensors, weights)
    (tmp_path / "r.json").unlink()
    done = run_program(["-m", "evals.run", f"checkpoint={weights.parent}", "length=64", "max_tokens=64", f"out={tmp_path / 'r.json'}"])
    assert done.returncode == 2 and "error: The logits are not finite, in fp32: " in done.stderr and not (tmp_path / "r.json").exists()


def test_documents_are_scored_from_their_own_beginning() -> None:
    adapter = own_adapter("mg", d_model=16, n_layers=2)
    rng, sizes = np.random.default_rng(0), [40, 7, 101, 40, 12, 2, 40, 9, 33]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    text = Text(rng.integers(0, 256, sum(sizes)), "test", starts=starts)
    coder = coder_of(byte_tokenizer())
    chosen = text.documents(9, 30, coder)
    assert [len(ids) for ids, _ in chosen] == [31, 7, 31, 31, 12, 2, 31, 9, 31] and [ids[0] for ids, _ in chosen] == text.ids[
        starts
    ].tolist()
    result, total, tokens = document_perplexity(adapter, chosen, chunk=8, batch=2), 0.0, 0
    for ids, _ in chosen:
        with torch.no_grad():
            logits = adapter.model(torch.from_numpy(ids[None, :-1])).logits[0].double()
        total -= float(logits.log_softmax(-1).gather(1, torch.from_numpy(ids[1:, None])).sum())
        tokens += len(ids) - 1
    assert result["tokens"] == tokens and result["nats_per_token"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(size for _, size in chosen), rel=1e-5)
    assert result["perplexity_low"] < result["perplexity"] < result["perplexity_high"] and "over documents" in result["interval"]
    pieces = Text(text.ids, "test").documents(5, 30, coder)  # one document: pieces of it
    assert [len(ids) for ids, _ in pieces] == [31] * 4 + [sum(sizes) - 9 * 30] and pieces[1][0][0] == text.ids[60]
    one = document_perplexity(adapter, pieces[:1], unit="pieces of 384 characters")
    assert one["perplexity_low"] is None and one["summary"].endswith("over 1 piece of 384 characters")
    with pytest.raises(ItemError, match="no document of two tokens"):
        document_perplexity(adapter, [(np.array([1]), 1)])
