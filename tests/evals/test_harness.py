"""The harness adapter: scores against plain loops, and a task over a local file where lm_eval is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.tokenizer import byte_tokenizer
from evals.adapters.base import Adapter, ItemError
from evals.adapters.load import load_adapter
from evals.measures.harness import generation_options, make_lm, run_task, score_pairs, split_pair
from models.generate import generate
from tests.evals.conftest import VOCABULARY, llama, own_adapter


@pytest.mark.parametrize("name", ["llama", "mamba2", "own"])
def test_scores_equal_a_plain_loop(adapters: dict[str, Adapter], name: str) -> None:
    adapter, rng = adapters[name], np.random.default_rng(0)
    pairs = [
        (rng.integers(1, VOCABULARY, int(a)).tolist(), rng.integers(1, VOCABULARY, int(b)).tolist()) for a, b in rng.integers(1, 9, (30, 2))
    ]
    for i in range(0, 30, 3):  # some that greedy decoding does write
        pairs[i] = (pairs[i][0], adapter.greedy(torch.tensor([pairs[i][0]]), len(pairs[i][1]), 4)[0].tolist())
    computed = score_pairs(adapter, pairs, 4, 3)
    for (context, continuation), (nats, exact) in zip(pairs, computed):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = adapter.model(ids).logits[0, len(context) - 1 : -1].double()
        assert nats == pytest.approx(float(logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum()), rel=1e-4)
        assert exact == (logits.argmax(-1).tolist() == continuation)
    assert sum(exact for _, exact in computed) >= 10
    with pytest.raises(ItemError, match="empty context"):
        score_pairs(adapter, [([], [1])], 4, 1)


def test_spaces_belong_to_the_continuation() -> None:
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    assert split_pair(encode, "a b ", "c") == (encode("a b"), encode(" c"))


def test_without_the_harness_there_is_a_sentence(adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ItemError, match="not installed"):
        make_lm(adapters["own"], 16, 2)


def test_a_task_over_a_local_file(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": f"The number after {i} is", "a": str(i + 1)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task: dict[str, Any] = {
        "task": "local_numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": " {{a}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity", "higher_is_better": False}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    adapter = adapters["own"]
    result = run_task(adapter, str(tmp_path / "task.yaml"), chunk=16, batch=2, limit=4, seed=0)
    coder = adapter.need_coder()
    pairs = [(coder.encode(r["q"]), coder.encode(f" {r['a']}")) for r in rows[:4]]  # no template, so no begin token
    nats = [n for n, _ in score_pairs(adapter, pairs, 16, 2)]
    assert result["figures"]["perplexity,none"] == pytest.approx(float(np.exp(-np.mean(nats))), rel=1e-4) and result["samples"] == 4
    with pytest.raises(ItemError, match="cannot be read"):
        run_task(adapter, str(tmp_path / "none.yaml"), chunk=16, batch=2, limit=4, seed=0)
    with pytest.raises(ItemError, match="lambada_openai"):
        run_task(adapter, "lambada_openai", chunk=16, batch=2, limit=4, seed=0)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("A question?", " yes"),
    ("A question?", " no"),
    ("", "alone"),
    ("It ends in spaces  ", "here"),
    ("x" * 40, " and more of it"),
    ("b", "c"),
]
TEXTS = [("One text of some length.",), ("b",), ("and another " * 9,)]


def templated(folder: Path) -> None:
    """A tokenizer whose template begins every text with <s>, and which has stored a truncation."""
    from tokenizers import AddedToken, processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", start)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.mark.parametrize("template", [False, True])
def test_a_foreign_model_scores_exactly_as_in_the_harness(template: bool, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    llama().save_pretrained(tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    if template:
        templated(tmp_path)
    ours, theirs = make_lm(load_adapter(str(tmp_path)), 16, 3), HFLM(pretrained=str(tmp_path), device="cpu", batch_size=3)
    assert ours.tok_encode("a b") == theirs.tok_encode("a b")
    assert ours.loglikelihood(requests(*PAIRS)) == theirs.loglikelihood(requests(*PAIRS))
    assert ours.loglikelihood_rolling(requests(*TEXTS)) == theirs.loglikelihood_rolling(requests(*TEXTS))
    options = [{"until": ["e"], "max_gen_toks": 9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 12}]
    written = []
    for lm in (ours, theirs):
        torch.manual_seed(3)
        written.append(lm.generate_until(requests(*[("Write this", o) for o in options])))
    assert written[0] == written[1] and len(set(written[0])) == 2


@pytest.mark.parametrize("template", [False, True])
def test_our_models_score_as_their_export_does_in_the_harness(template: bool, tmp_path: Path) -> None:
    """The model of transformers with the very weights of ours: a Llama of our layout, imported."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer

    from data.tokenizer import coder_of
    from evals.adapters.own import OwnAdapter
    from models.checkpoint import load_model

    llama().save_pretrained(tmp_path)
    if template:
        templated(tmp_path)
    else:
        byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"})
        )
    coder = coder_of(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tmp_path)
    ours = make_lm(OwnAdapter(load_model(tmp_path)[0], coder, "x", str(tmp_path)), 16, 3)
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=3)
    for computed, expected in zip(ours.loglikelihood(requests(*PAIRS)), theirs.loglikelihood(requests(*PAIRS))):
        assert computed[0] == pytest.approx(expected[0], rel=1e-4) and computed[1] == expected[1]
    assert ours.loglikelihood_rolling(requests(*TEXTS)) == pytest.approx(theirs.loglikelihood_rolling(requests(*TEXTS)), rel=1e-4)
    greedy = [("Write this", {"until": ["e", "!"], "max_gen_toks": 30}), ("and this", {"max_gen_toks": 30})]
    assert ours.generate_until(requests(*greedy)) == theirs.generate_until(requests(*greedy))


def test_a_text_ends_at_its_end_at_a_stop_text_or_after_so_many_tokens() -> None:
    pytest.importorskip("lm_eval")
    adapter = own_adapter()
    coder = adapter.need_coder()
    lm = make_lm(adapter, 16, 2)
    whole = generate(adapter.model, torch.tensor([coder.encode("Begin")]), 40, temperature=0.0)[0, 5:].tolist()
    end = next(token for i, token in enumerate(whole) if i > 4 and token not in whole[:i])  # a token that greedy decoding comes to
    place = whole.index(end)
    for end_ids, limit, expected in (([end], 40, whole[:place]), (coder.end_ids, 3, whole[:3])):
        coder.end_ids = end_ids
        assert lm.generate_until(requests(("Begin", {"max_gen_toks": limit}))) == [coder.decode(expected)]
    text = coder.decode(whole)
    stop = text[7:9]
    assert lm.generate_until(requests(("Begin", {"max_gen_toks": 40, "until": [stop, "never there"]}))) == [text.split(stop)[0]]
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    first = lm.generate_until(requests(("Begin", sampled), ("Begin", sampled)))
    assert first[0] != first[1] and first == make_lm(adapter, 16, 2).generate_until(requests(("Begin", sampled), ("Begin", sampled)))
    assert first != make_lm(adapter, 16, 2, seed=9).generate_until(requests(("Begin", sampled), ("Begin", sampled)))
    assert lm.generate_until(requests(("Begin", {**sampled, "top_k": 1}))) == [coder.decode(whole[:12])]
    assert make_lm(adapter, 16, 2, add_bos_token=True).tok_encode("a") == coder.encode("a", start=True)


def test_generation_options_are_read_as_the_harness_reads_them() -> None:
    assert generation_options({}) == ({"temperature": 0.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}, 256, None)
    sampling, new, until = generation_options({"temperature": 0.5, "top_p": 0.8, "max_new_tokens": 7, "until": "x"})
    assert (sampling["temperature"], sampling["top_p"], new, until) == (0.5, 0.8, 7, "x")
    assert generation_options({"do_sample": False, "temperature": 0.5})[0]["temperature"] == 0.0
    assert generation_options({"do_sample": True})[0]["temperature"] == 1.0
    with pytest.raises(ItemError, match="penalty_alpha"):
        generation_options({"penalty_alpha": 0.6})
