"""Retrieval tasks by text, figures by brute force, and a runner that fails by the item and resumes."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from data.tokenizer import byte_tokenizer, coder_of, train_bpe
from evals.adapters.base import ItemError
from evals.adapters.hf import HFAdapter
from evals.inputs.tasks import NAMES, NOISE, Task
from evals.inputs.texts import DEMO, Corpus, Text, corpus_of_file, tokenised
from evals.measures.position import collapse, position_curve, windows
from evals.measures.retrieval import grid, score
from evals.measures.statistics import PositionSums, bootstrap_ratio, log_edges, wilson
from evals.report.sections import write_report
from evals.run import main
from evals.suites import runner
from evals.suites.items import Item, items_of
from evals.suites.runner import _name, guarded, run_items
from evals.suites.subject import Settings, Subject
from tests.conftest import run_ranks
from tests.evals.conftest import VOCABULARY, own_adapter

CODER = coder_of(byte_tokenizer())
PROSE = Text(np.array(CODER.encode("It is a truth universally acknowledged. " * 400), dtype=np.int64), "test")


def test_passkey_text_is_the_published_one() -> None:
    sample = Task("passkey").sample(CODER, 2000, 0.5, 7, seed=1)
    assert len(sample.prompt) == 2000 and sample.prompt[0] == CODER.start_ids[0]
    text = CODER.decode(sample.prompt)
    key = sample.answers[0]
    match = re.search(
        r"(.*?)The passkey is (\d{5})\. Remember it\. (\d{5}) is the passkey\.\n(.*)\nWhat is the pass key\? The passkey is$", text, re.S
    )
    assert match and match[2] == match[3] == key and CODER.decode(sample.answer) == " " + key
    assert match[1].endswith(NOISE) and match[4].startswith(NOISE[:20])
    assert abs(len(match[1]) / len(text) - 0.5) < 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["DQ", "DQDQ"])
def test_samples_come_from_the_seed_and_hold_their_answer(name: str, order: str) -> None:
    task = Task(name, noise="prose" if name in ("passkey", "niah_multikey") else "repeat", keys=3 if name == "passkey" else 1, order=order)
    a, b = (task.sample(CODER, 3001, 0.3, 5, seed=4, text=PROSE) for _ in range(2))
    assert a == b
    assert (
        task.sample(CODER, 3001, 0.3, 6, seed=4, text=PROSE).prompt
        != a.prompt
        != task.sample(CODER, 3001, 0.3, 5, seed=5, text=PROSE).prompt
    )
    text = CODER.decode(a.prompt)
    assert all(answer in text for answer in a.answers)
    assert len(a.prompt) == 3001 if order == "DQ" else len(a.prompt) > 5000


def test_frequent_words_are_the_most_frequent() -> None:
    for name in ("cwe", "fwe"):
        sample = Task(name).sample(CODER, 6000, 0.5, 0, seed=0)
        words = CODER.decode(sample.prompt).split("\n\n")[1].split("\n")[0].split()
        counts = {w: words.count(w) for w in set(words[:-1])}
        ranked = sorted(counts, key=lambda w: -counts[w])
        assert set(ranked[: len(sample.answers)]) == set(sample.answers)
        assert counts[ranked[len(sample.answers) - 1]] > counts[ranked[len(sample.answers)]]


def test_too_short_a_prompt_is_a_sentence() -> None:
    for name in NAMES:
        with pytest.raises(ItemError, match="does not fit"):
            Task(name).sample(CODER, 60, 0.5, 0, seed=0)
    with pytest.raises(ValueError, match="There is no task"):
        Task("nonsense")


def test_a_tokenizer_that_cannot_spell_the_answers_is_not_asked() -> None:
    """Of unknown tokens every text is the answer: a model of one symbol had 100 % of the passkeys."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "passkey": 2, "the": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    spaced = train_bpe(["The passkey is 12345. VAR ABCDE = 1"], 257)
    spaced.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(True)])
    for name in NAMES:
        with pytest.raises(ItemError, match="has no tokens that spell"):
            Task(name).sample(coder_of(words), 6000, 0.5, 0, seed=0)
    assert "1 2" in coder_of(spaced).decode(coder_of(spaced).encode("12"))
    assert Task("passkey").sample(coder_of(spaced), 2000, 0.5, 0, seed=0).answer  # told by its ids, however it is written
    adapter = own_adapter()
    adapter.coder = coder_of(words)
    text = tokenised(Corpus("c", ["the passkey is lost"]), adapter)
    assert text.lost == 0.4 and text.note.startswith("40.0% of the text's tokens are the unknown one")
    adapter.coder = coder_of(spaced)  # "1 2" for "12", and a blank before it
    assert tokenised(Corpus("c", ["12"]), adapter).note.startswith("the tokens stand for 200.0% of the text's bytes")
    adapter.coder = CODER
    assert tokenised(Corpus("c", ["the passkey", "é"]), adapter).note == "" == PROSE.note


def test_scores_of_a_model_that_always_knows_and_one_that_never_does() -> None:
    adapter, task = own_adapter(), Task("passkey")
    samples = [task.sample(CODER, 400, 0.5, n, seed=0) for n in range(3)]
    written = adapter.greedy(torch.tensor([s.prompt for s in samples]), 6, 100)
    assert score(adapter, task, samples, 100, 2) == [0.0, 0.0, 0.0]
    for sample, ids in zip(samples, written.tolist()):
        sample.answer, sample.answers = ids, [CODER.decode(ids)]
    assert score(adapter, task, samples, 100, 2) == [1.0, 1.0, 1.0]
    result = grid(adapter, Task("vt"), 800, [0.1, 0.9], 2, chunk=64)
    assert len(result["cells"]) == 1 and result["n"] == 2 and 0 <= result["low"] <= result["accuracy"] <= result["high"] <= 1


def test_position_sums_against_brute_force() -> None:
    rng, length = np.random.default_rng(0), 5003
    losses = rng.random((9, length))
    sums, at = PositionSums(length, 9, per_octave=3), 0
    while at < length:
        n = int(rng.integers(1, 900))
        sums.add(at, losses[:4, at : at + n], 0)
        sums.add(at, losses[4:, at : at + n], 4)
        at += n
    buckets, edges = sums.buckets(), log_edges(length, 3)
    assert {100, 200} <= set(log_edges(1000, through=200)) and log_edges(10, through=200).tolist() == [0, 10]
    assert edges[0] == 0 and edges[-1] == length and [(b["from"], b["to"]) for b in buckets] == list(zip(edges[:-1], edges[1:]))
    for b in buckets:
        part = losses[:, b["from"] : b["to"]]
        assert b["tokens"] == part.size and b["nats_per_token"] == pytest.approx(part.mean(), rel=1e-12)
        assert b["low"] <= part.mean() <= b["high"]


def test_intervals() -> None:
    low, high = wilson(190, 200)
    assert low == pytest.approx(0.9105, abs=5e-4) and high == pytest.approx(
        0.9726, abs=5e-4
    )  # R: binom.confint(190, 200, methods="wilson")
    assert wilson(0, 10)[0] == 0 and 0.2 < wilson(0, 10)[1] < 0.35 and wilson(10, 10)[1] == 1
    inside = 0
    for trial in range(100):
        x = np.random.default_rng(trial).normal(3, 1, 40)
        low, high = bootstrap_ratio(x, np.ones(40), draws=400)
        inside += low <= 3 <= high
    assert 86 <= inside <= 100


def curve(values: list[float]) -> list[dict[str, Any]]:
    edges = [0, *(16 * 2**k for k in range(len(values)))]
    return [{"from": a, "to": b, "nats_per_token": v, "tokens": b - a} for a, b, v in zip(edges, edges[1:], values)]


def test_collapse_criteria() -> None:
    assert collapse(curve([9, 4, 3, 3, 3, 3, 3]), 64)["verdict"] == "holds"
    verdict = collapse(curve([9, 4, 3, 3.05, 3.2, 3.3, 3.4, 3.6]), 64)  # buckets end at 16, 32, 64 | 128, 256, ...
    assert (
        verdict["onset_0.1"] == 128
        and verdict["onset_0.5"] == 1024
        and verdict["forgets_2x"]
        and verdict["delta_at_end"] == pytest.approx(0.6)
    )
    spike = collapse(curve([9, 4, 3, 3.0, 3.9, 3.0, 3.0, 3.0, 3.0, 3.0]), 64)
    assert spike["onset_0.1"] is None and spike["delta_largest"] == pytest.approx(0.9)
    assert not collapse(curve([9, 4, 3, 8.1]), 64)["forgets_2x"]
    harder = {"inside": curve([9, 4, 2.5]), "by_place": curve([9, 4, 2.5, 3.0, 3.1])}  # the text, not the model, gets worse
    verdict = collapse(curve([9, 4, 3, 3.05, 3.2]), 64, harder)
    assert verdict["delta"] == pytest.approx([0.05, 0.1]) and verdict["level_inside"] == 2.5
    assert "not measured" in collapse(curve([9, 4, 3]), 4096)["verdict"]


def test_windows_score_every_token_once_with_at_most_T_before_it() -> None:
    adapter, T = own_adapter("mg", d_model=16, n_layers=2), 20
    for length in (100, 93, 21):
        rows = np.random.default_rng(length).integers(0, 256, (3, length + 1))
        result, total, first = windows(adapter, rows, T, batch=7), 0.0, 0
        for start in [*range(0, length - T + 1, 10), length - T]:
            ids = torch.from_numpy(rows[:, start : start + T + 1])
            nll, _ = adapter.losses(ids[:, :-1], ids[:, 1:], adapter.start(3))
            total += float(nll[:, first - start :].sum()) if first < start + T else 0.0
            first = start + T
        assert sum(b["tokens"] for b in result["by_place"]) == 3 * length
        assert sum(b["nats_per_token"] * b["tokens"] for b in result["by_place"]) == pytest.approx(total, rel=1e-5)
        assert result["inside"][-1]["to"] == T and sum(b["tokens"] for b in result["inside"]) == result["windows"] * T
        curve_of_rows = position_curve(adapter, rows, chunk=13, through=T)["buckets"]
        assert [b["to"] for b in curve_of_rows] == [b["to"] for b in result["by_place"]]
        assert curve_of_rows[0]["nats_per_token"] == pytest.approx(result["by_place"][0]["nats_per_token"], rel=1e-5)
        assert collapse(curve_of_rows, T, result)["delta"][0] != 0


def test_items_fail_alone_and_are_not_done_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, calls = own_adapter(), []

    def item(name: str, act: Any) -> Item:
        def run(progress: Any) -> dict[str, Any]:
            calls.append(name)
            return act()

        return Item(name, "position", {"n": 1}, run)

    def memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def stopped() -> dict[str, Any]:
        raise KeyboardInterrupt

    good = {"nats_per_token": 1.0, "tokens": 3}
    items = [item("good", lambda: good), item("memory", memory), item("nan", lambda: {**good, "nats_per_token": float("nan")})]
    with pytest.raises(KeyboardInterrupt):
        run_items([*items, item("stopped", stopped)], adapter, tmp_path, False)
    records = run_items([*items, item("stopped", lambda: good)], adapter, tmp_path, False)
    assert calls == ["good", "memory", "nan", "stopped", "memory", "nan", "stopped"]
    assert [r["status"] for r in records] == ["done", "failed", "failed", "done"]
    assert "Out of memory" in records[1]["reason"] and "not finite" in records[2]["reason"]
    (tmp_path / "items" / "good.json").write_text('{"torn')
    with torch.no_grad():
        next(adapter.model.parameters()).add_(1)
    run_items(items[:1], adapter, tmp_path, False)
    assert calls[-1] == "good"
    parts = [run_items(items[:1] * 5, adapter, tmp_path / "r", False, rank, 3) for rank in range(3)]
    assert sum(map(len, parts)) == 5


def test_results_of_another_model_of_that_name_stay(tmp_path: Path) -> None:
    old, other, out = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "out"
    for folder in (old / "checkpoints" / "step-00000002", old / "checkpoints" / "step-00000004", other, out / "run" / "items"):
        folder.mkdir(parents=True)
    record = {"item": "x", "model": {"folder": str(old / "checkpoints" / "step-00000002")}}
    (out / "run" / "items" / "x.json").write_text(json.dumps(record))
    assert _name(str(other), {}, out) == "run-2" and _name(str(old), {}, out) == "run", "a run that has gone on is measured anew"
    assert _name(str(other), {"run-2": ""}, out) == "run-3"
    old.rename(tmp_path / "a" / "moved")
    assert _name(str(other), {}, out) == "run"


def tried(item: Item) -> dict[str, Any]:
    return guarded(lambda: item.run(lambda a, b: None))


def test_bad_models_are_one_sentence_each(pages: Path) -> None:
    adapter = own_adapter()
    subject = Subject(
        adapter,
        Settings(suite="quick", max_length=512, lengths=[300], samples=1, depths=1, rows=1, train_length=128, text=str(pages)),
    )
    assert [tried(item)["status"] for item in items_of(subject)] == ["done"] * len(items_of(subject))
    with torch.no_grad():
        adapter.model.embedding.weight.fill_(float("nan"))
    for item in items_of(subject):
        outcome = tried(item)
        assert outcome["status"] == "failed" and "not finite" in outcome["reason"]
    adapter.coder = None
    outcome = tried(next(i for i in items_of(subject) if i.name == "passkey-300"))
    assert "no tokenizer" in outcome["reason"]


def test_prompts_beyond_the_positions_of_a_model_are_a_sentence_and_the_rest_goes_on(pages: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=320, bos_token_id=0, eos_token_id=0)
    adapter = HFAdapter(GPT2LMHeadModel(config).eval(), CODER, "gpt2", "gpt2")
    chosen = Settings(suite="quick", max_length=256, lengths=[300, 400], samples=1, depths=1, rows=1, train_length=64, text=str(pages))
    items = {item.name: tried(item) for item in items_of(Subject(adapter, chosen))}
    assert items["passkey-300"]["status"] == items["position-prose"]["status"] == "done"
    assert items["passkey-400"]["status"] == "failed" and "more than the 320 positions" in items["passkey-400"]["reason"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pages of a book, which are soon read."""
    path = tmp_path_factory.mktemp("pages") / "pages.txt"
    path.write_text(corpus_of_file(DEMO, 30_000).documents[0])
    return path


def test_two_processes_share_the_items_and_write_one_report(hf_folder: Path, pages: Path, tmp_path: Path) -> None:
    words = [
        f"checkpoint={hf_folder}",
        "suite=quick",
        "train_length=64",
        "max_length=256",
        "lengths=320",
        "samples=1",
        "depths=1",
        "rows=1",
    ]
    done = run_ranks(2, ["-m", "evals.run", *words, "device=cpu", f"out={tmp_path}", f"text={pages}"])
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "llama" / "quick.json").read_text())["items"]
    assert {r["item"] for r in written} >= {"position-prose", "passkey-320", "remembrance"} and all(r["status"] == "done" for r in written)
    assert {line[:5] for line in done.stdout.splitlines() if "llama:" in line} <= {"[1/1]", "[1/2]", "[2/2]"}
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()


def test_items_are_read_and_written_by_one_process_at_a_time(
    hf_folder: Path, pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that end together, who read fewer items must not write behind who read all."""
    held: list[str] = []

    def watched(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watch(*args: Any) -> Any:
            if name == "report" or str(args[0]).endswith("quick.json"):
                with pytest.raises(BlockingIOError), (tmp_path / "lock").open() as other:
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(name)
            return call(*args)

        return watch

    monkeypatch.setattr(runner, "write_json", watched(runner.write_json, "suite"))
    monkeypatch.setattr(runner, "write_report", watched(runner.write_report, "report"))
    words = [f"checkpoint={hf_folder}", "suite=quick", "only=passkey", "lengths=320", "samples=1", "depths=1", "device=cpu"]
    assert main([*words, f"out={tmp_path}", f"text={pages}"]) == 0
    assert held == ["suite", "report"] and not (tmp_path / "lock").exists()


def test_the_command_line_writes_a_report_and_goes_on(
    hf_folder: Path, pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"checkpoint={hf_folder},{hf_folder}",
        "suite=quick",
        "train_length=64",
        "lengths=320",
        "samples=1",
        "depths=2",
        "rows=1",
        "device=cpu",
    ]
    words += [f"out={tmp_path}", f"text={pages}", "only=p", "chunk=128"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "there already" not in first and main(words) == 0 and "there already" in capsys.readouterr().out
    suite = json.loads((tmp_path / "llama" / "quick.json").read_text())
    assert {"commit", "device", "torch"} <= set(suite["items"][0]["environment"]) and suite["settings"]["seed"] == 0
    assert (tmp_path / "llama-2" / "quick.json").exists()
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64" in page and "llama-2" in page and 'src="http' not in page
    assert "| llama |" in (tmp_path / "report.md").read_text()
    write_report(tmp_path)
    capsys.readouterr()
    assert main([*words, "only=nosuch", f"out={tmp_path / 'nothing'}"]) == 2 and "contains 'nosuch'" in capsys.readouterr().err
    assert not list((tmp_path / "nothing").iterdir()), "a report of nothing"


def test_one_model_that_cannot_be_loaded_is_a_sentence_and_the_others_go_on(
    hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"checkpoint={tmp_path}/nowhere,{hf_folder}", "suite=state_tracking", "device=cpu", f"out={tmp_path}/out"]
    assert main(words) == 1, "nothing was measured"
    said = capsys.readouterr().out
    assert "There is no" in said and "was not trained on a generated task" in said
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| nowhere | loading | There is no" in report and "| llama | state_tracking |" in report
    (tmp_path / "a,b").mkdir()
    assert main([f"checkpoint={tmp_path}/a,b", *words[1:]]) == 2 and f"{tmp_path}/a,b" in capsys.readouterr().err, (
        "one folder that is there"
    )


def test_a_model_of_a_generated_task_is_scored_on_it_by_every_suite(tmp_path: Path) -> None:
    run = {"data": {"reader": "synthetic", "task": {"name": "parity"}}, "train": {"seq_len": 16}}
    for suite in ("quick", "long_context", "state_tracking", "all"):
        items = items_of(Subject(own_adapter(), Settings(suite=suite, sequences=20, lengths=[16, 40], train_length=16), run))
        assert [item.name for item in items] == ["state_tracking"]
    records = run_items(items, own_adapter(), tmp_path / "model", False)
    assert [row["length"] for row in records[0]["result"]["lengths"]] == [16, 40] and 0 <= records[0]["result"]["accuracy"] <= 1
    write_report(tmp_path)
    assert "State tracking and recall" in (tmp_path / "report.md").read_text() and (tmp_path / "plots" / "state_tracking.png").exists()


@pytest.mark.parametrize(
    "words, part",
    [
        (["suite=quick"], "checkpoint=DIR"),
        (["checkpoint=x", "suite=quick", "lengths=a"], "lengths"),
        (["checkpoint=x", "suite=quick", "seed=-1"], "seed"),
        (["checkpoint=/nowhere", "suite=quick"], "There is no"),
        (["suite=state_tracking"], "Say what to evaluate"),
        (["checkpoint=x", "suite=quick", "redo=maybe"], "redo"),
    ],
)
def test_mistakes_are_sentences(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2 and part in capsys.readouterr().err
