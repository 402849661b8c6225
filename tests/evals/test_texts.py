"""One text for all models: read as prepare reads, never repeated, rows apart, and what is known of a model's training on it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from data.prepare import main as prepare
from data.shards import ShardSet
from data.sources import Source
from data.tokenizer import byte_tokenizer, coder_of, train_bpe
from evals.adapters.base import ItemError
from evals.inputs.common_text import CommonText
from evals.inputs.seen import facts_of_run, seen, share_found, window_hashes
from evals.inputs.texts import Corpus, Text, corpus_of_file, corpus_of_shards, tokenised
from evals.measures.position import collapse, unigram_nats
from evals.run import by_tokens
from evals.suites.items import items_of
from evals.suites.prose import report_on_prose
from evals.suites.subject import Settings, Subject
from tests.evals.conftest import own_adapter
from training.errors import UserError

CODER = coder_of(byte_tokenizer())


def prose(seed: int, words: int) -> str:
    """Text in which no passage occurs twice."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    rng = np.random.default_rng(seed)
    return " ".join("".join(letters[i] for i in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(words))


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.xz", ".txt.bz2", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_text_is_read_as_prepare_reads_it(ending: str, tmp_path: Path) -> None:
    path, text = tmp_path / f"a{ending}", "Ein Satz über nichts.\n" * 20
    data = (json.dumps({"text": text}) if "json" in ending else text).encode()
    if ending == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    elif ending.endswith(".zst"):
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    else:
        packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
        path.write_bytes(packers.get(path.suffix, bytes)(data))
    assert corpus_of_file(path).documents == list(Source(str(path))) == [text]


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.bin", b"\x00\x01\x02"),
        ("a.txt", bytes(range(256)) * 4),
        ("zeros.txt", b"a\0b\0c\0" * 100),
        ("a.txt.gz", b"this is no gzip"),
        ("a.parquet", b"PAR2"),
        ("a.jsonl", b"not json\n"),
        ("empty.txt", b" \n"),
    ],
)
def test_what_is_no_text_is_refused_in_a_sentence(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"^The text {re.escape(str(tmp_path / name))} (cannot be read: |holds )"):
        corpus_of_file(tmp_path / name)


def test_utf16_is_read_with_its_mark_and_refused_without(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Wörter und Sätze.".encode("utf-16"))
    assert corpus_of_file(path).documents == ["Wörter und Sätze."]
    path.write_bytes("Wörter und Sätze.".encode("utf-16-le"))
    with pytest.raises(UserError, match="UTF-8"):
        corpus_of_file(path)


def test_rows_are_apart_and_a_short_text_is_never_repeated() -> None:
    text = Text(np.arange(1000), "numbers")
    for count, length in ((7, 100), (3, 333), (1, 1000), (10, 100)):
        rows = text.rows(count, length, seed=5)
        assert rows.shape == (count, length) and len(np.unique(rows)) == count * length and (np.diff(rows) == 1).all()
    assert text.fitting(4, 300) == (3, 300) and text.fitting(4, 5000) == (1, 1000) and text.fitting(2, 10) == (2, 10)
    with pytest.raises(ItemError, match="1,000 tokens, too few for 2"):
        text.rows(2, 501, seed=0)
    with pytest.raises(ItemError, match="no text"):
        Text(np.arange(1), "one").fitting(1, 10)


def test_documents_get_the_ids_that_the_coder_gives_them() -> None:
    adapter, documents = own_adapter("m", d_model=16, n_layers=1), ["Ein Satz.", "", "zwei\n\nSätze " * 9]
    text = tokenised(Corpus("x", documents), adapter)
    expected = [adapter.need_coder().encode(d, start=True) for d in documents]
    assert text.ids.tolist() == sum(expected, []) and text.starts == [0, len(expected[0]), len(expected[0]) + len(expected[1])]


def test_models_of_different_tokens_and_lengths_read_the_same_characters(tmp_path: Path) -> None:
    a, b = Corpus("x", ["abcdef", "gh"]), Corpus("x", [str(i) * 9 for i in range(10)])
    assert a.excerpts(4, 3) == ["abc", "def", "gh"] and a.excerpts(2, 3) == ["abc", "gh"] and a.excerpts(1, 9) == ["abcdef"]
    assert b.excerpts(4, 5) == ["00000", "33333", "66666", "99999"] and Corpus("x", []).excerpts(3, 3) == []
    path = tmp_path / "a.txt"
    path.write_text(prose(0, 900))
    models = [own_adapter("m", d_model=16, n_layers=1), own_adapter("m", d_model=16, n_layers=1)]
    models[1].coder = coder_of(train_bpe([prose(0, 900)], 300))
    models[0].train_length, models[1].train_length, models[1].position_limit = 64, 256, 100
    facts = {str(i): {"run": {"train": {"seq_len": model.train_length}}} for i, model in enumerate(models)}
    common, texts = CommonText(["0", "1"], text=str(path), facts=facts), []
    for i, model in enumerate(models):
        items = items_of(Subject(model, Settings(suite="quick", rows=5), None, common, str(i)))
        assert items[0].name == "documents"
        texts.append((items[0].settings["characters"], items[0].run(lambda a, b: None)))
    assert texts[0][0] == texts[1][0] == 3 * 4 * 64
    assert texts[0][1]["bytes"] == sum(len(x) for x in common.corpus.excerpts(5, 768)) and texts[0][1]["documents"] == 5
    assert texts[1][1]["bytes"] == texts[0][1]["bytes"] and texts[1][1]["documents"] > 5 and texts[1][1]["tokens"] < texts[0][1]["tokens"]


def test_the_hash_is_of_the_documents_alone(tmp_path: Path) -> None:
    a, b = Corpus("x", ["ab", "c"]), Corpus("y", ["ab", "c"])
    assert a.sha256 == b.sha256 != Corpus("x", ["a", "bc"]).sha256 and a.bytes == 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"text": prose(i, 400)}) for i in range(12)))
    assert prepare([f"input={folder / 'in.jsonl'}", f"out={folder / 'out'}", "tokenizer=bytes", "valid_docs=[3,7]"]) == 0
    return folder / "out"


def test_a_text_of_several_shards_takes_from_each_and_names_what_it_lacks(shards: Path) -> None:
    twice = corpus_of_shards(f"{shards},{shards}")
    assert twice.documents == [prose(i, 400) for i in (3, 7, 3, 7)] and twice.shards is None
    part = corpus_of_shards(f"{shards},/nowhere", limit=1000)
    assert sum(map(len, part.documents)) == 500 and "the first 1 of 2 documents" in part.note and "nothing of /nowhere" in part.note
    with pytest.raises(UserError, match="No folder"):
        corpus_of_shards("/nowhere,/neither")
    with pytest.raises(UserError, match="holds no token shards"):
        corpus_of_shards("/nowhere")


def run_facts(folder: Path, **state: Any) -> dict[str, Any]:
    return {"run": {"data": {"path": str(folder)}}, "state": {"fingerprint": [ShardSet(folder, "train").fingerprint], **state}}


def test_what_was_trained_on_is_never_called_held_out(shards: Path) -> None:
    facts = run_facts(shards)
    assert corpus_of_shards(str(shards)).documents == [prose(3, 400), prose(7, 400)]
    assert seen([prose(3, 400), prose(7, 400)], facts).status == "held out"
    assert seen([prose(4, 400)], facts).status == "trained on"
    assert seen([prose(4, 400)[100:1500]], facts).status == "trained on"  # however the documents are cut
    mixed = seen([prose(4, 400), prose(100, 400)], facts)
    assert mixed.status == "partly trained on" and mixed.share == pytest.approx(0.5, abs=0.1)
    assert seen([prose(3, 400)], {}).status == "not known"
    assert seen([prose(3, 400)], {**facts, "state": {"fingerprint": ["another"]}}).status == "not known"
    gone = seen([prose(3, 400)], {"run": {"data": {"path": {str(shards): 0.5, "/nowhere": 0.5}}}, "state": facts["state"]})
    assert gone.status == "not known" and "/nowhere" in gone.why
    for start in ({"train": {"start_from": "/nowhere"}}, {"model": {"init_from": "/nowhere"}}):
        begun = seen([prose(3, 400)], {**facts, "run": {**facts["run"], **start}})
        assert begun.status == "not known" and "began from /nowhere" in begun.why


def test_windows_are_found_by_hash_wherever_they_begin() -> None:
    tokens = np.random.default_rng(0).integers(0, 50_000, 3000)
    hashes = window_hashes(tokens, 20)
    assert len(np.unique(hashes)) == len(hashes) == 2981
    for start in (0, 1, 1777, 2980):
        assert window_hashes(tokens[start : start + 20], 20)[0] == hashes[start]


def test_documents_of_every_part_of_the_training_data_are_found(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.inputs.seen.BLOCK", 1000)
    train = ShardSet(shards, "train")
    assert all(share_found([prose(i, 400)], train) == 1.0 for i in (0, 5, 11)) and share_found([prose(3, 400)], train) == 0.0
    monkeypatch.setattr("evals.inputs.seen.MOST", 5000)  # only some blocks are read: a sample
    assert 0.6 <= share_found([prose(i, 400) for i in range(12) if i not in (3, 7)], train) <= 1.0
    monkeypatch.setattr(train, "coder", lambda: coder_of(Tokenizer(models.WordLevel({"</s>": 0, "a": 1}))))
    assert share_found([prose(0, 400)], train) == 0.0  # what the shards have no tokens for does not occur in them


def test_models_side_by_side_get_one_text_that_none_was_trained_on(shards: Path, tmp_path: Path) -> None:
    facts = run_facts(shards)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "everywhen.json").write_text(json.dumps({"model": {}, **facts}))
    assert facts_of_run(exported) == facts and facts_of_run(tmp_path) == {}
    common = CommonText(["run", str(exported), "foreign"], facts={"run": facts, str(exported): facts, "foreign": {}})
    assert common.corpus.documents == [prose(3, 400), prose(7, 400)]
    assert [common.seen_by(p)["status"] for p in ("run", str(exported), "foreign")] == ["held out", "held out", "not known"]
    # another run was trained on the first one's held-out documents: then its own are taken, which the first does not know
    other = tmp_path / "other"
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": prose(i, 400)}) for i in (3, 7, 30, 31)))
    assert prepare([f"input={tmp_path / 'in.jsonl'}", f"out={other}", "tokenizer=bytes", "valid_docs=[2]"]) == 0
    both = CommonText(["a", "b"], facts={"a": facts, "b": run_facts(other)})
    assert both.corpus.documents == [prose(30, 400)]
    assert [both.seen_by(p)["status"] for p in "ab"] == ["held out", "held out"]
    assert CommonText(["a", "b"], data=str(shards), facts={"a": facts, "b": run_facts(other)}).seen_by("b")["status"] == "trained on"


def test_a_report_on_one_run_is_of_its_held_out_text(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "everywhen.json").write_text(json.dumps({"model": {}, **run_facts(shards)}))
    monkeypatch.setattr("evals.suites.prose.load_adapter", lambda checkpoint, device: own_adapter("m", d_model=16, n_layers=1))
    values = {"checkpoint": str(tmp_path), "device": "cpu", "data": None, "text": None, "seed": 0, "rows": 2, "length": 64}
    report = report_on_prose("report", {**values, "out": str(tmp_path / "r.json")}, lambda adapter, ids: {}, lambda report: "")
    assert report["seen"]["status"] == "held out" and str(shards) in report["text"]


def test_a_curve_says_how_far_its_text_reaches_and_an_untrained_model_gets_no_verdict(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text(prose(0, 150))
    adapter = own_adapter("m", d_model=16, n_layers=1)
    settings = Settings(suite="quick", text=str(path), train_length=64, max_length=4096, rows=8, lengths=[300], samples=1, depths=1)
    items = {item.name: item for item in items_of(Subject(adapter, settings))}
    curve = items["position-prose"].run(lambda a, b: None)
    tokens = len(tokenised(corpus_of_file(path), adapter).ids)
    assert curve["rows"] == 1 and curve["length"] == tokens - 1 and f"reaches {tokens:,} tokens of the 4,097" in curve["note"]
    assert curve["text"]["sha256"] == corpus_of_file(path).sha256 and curve["seen"]["status"] == "not known"
    assert curve["collapse"]["verdict"].startswith("no verdict: the model is no better than a unigram")
    assert items["remembrance"].run(lambda a, b: None)["length"] == 128


def test_perplexity_of_a_text_or_of_several_models_is_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(prose(0, 300).encode()))
    for words in ({"text": str(path)}, {"checkpoint": "a,b"}):
        assert not by_tokens({"suite": "perplexity", "checkpoint": "a", "text": None, **words})
    assert by_tokens({"suite": "perplexity", "checkpoint": "a", "text": None})
    chosen = Settings(suite="perplexity", text=str(path), train_length=64, max_length=128)
    items = items_of(Subject(own_adapter("m", d_model=16, n_layers=1), chosen))
    assert [item.name for item in items] == ["documents", "position-prose"]
    results = [item.run(lambda a, b: None) for item in items]
    assert all(result["text"]["sha256"] == corpus_of_file(path).sha256 for result in results) and results[0]["bits_per_byte"] > 0


def test_results_are_keyed_by_what_the_files_hold(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    text, task, rows = tmp_path / "a.txt", tmp_path / "task.yaml", tmp_path / "rows.jsonl"
    task.write_text(json.dumps({"task": "t", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}}))

    def keys() -> dict[str, Any]:
        adapter = own_adapter("m", d_model=16, n_layers=1)
        chosen = Settings(suite="all", text=str(text), tasks=f"{task},{tmp_path / 'b' / 'task.yaml'}", train_length=64, cures="none")
        return {item.name: item.settings for item in items_of(Subject(adapter, chosen))}

    text.write_text("one text")
    rows.write_text("one")
    first = keys()
    text.write_text("two text")  # the same path, the same size
    rows.write_text("two")
    second = keys()
    changed = {name for name in first if first[name] != second[name]}
    assert {"documents", "position-prose", "remembrance", "passkey-prose-256", "harness-task"} <= changed
    assert not {"passkey-256", "states-random", "harness-task-2"} & changed
    task.write_text(task.read_text().replace('"t"', '"u"'))
    assert keys()["harness-task"] != second["harness-task"]


def test_the_hash_of_a_model_is_of_all_that_it_says() -> None:
    import torch

    a, b = own_adapter("m", d_model=16, n_layers=1), own_adapter("m", d_model=16, n_layers=1)
    assert a.content_hash() == b.content_hash()
    with torch.no_grad():
        weight = b.model.embedding.weight
        weight.copy_(weight.flip(0))  # every sum is the same
    assert a.content_hash() != b.content_hash()
    c = own_adapter("m", d_model=16, n_layers=1)
    c.coder = None
    assert c.content_hash() != a.content_hash()


def test_a_unigram_leaves_each_token_out_of_its_own_count() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    entropy = float(-(p * np.log(p)).sum())
    text = rng.choice(4, 20_000, p=p)
    assert unigram_nats(text[:5000], text, 4) == pytest.approx(entropy, rel=0.02)
    assert unigram_nats(np.arange(100), np.arange(100), 1000) == pytest.approx(np.log(1000 * 199 / 100), rel=0.01)  # nothing occurs twice
    curve = [{"from": a, "to": 2 * a, "nats_per_token": 3.0, "tokens": a} for a in (16, 32, 64, 128)]
    assert collapse(curve, 64)["verdict"] == "holds" and collapse(curve, 64, None, "why")["verdict"] == "no verdict: why"
