"""Held-out figures of mixtures by source, of data with nothing held out, and of a single file."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data.prepare import main
from data.shards import open_held_out
from evals.measures.mixture import combined, names_of, of_report
from evals.measures.perplexity import Perplexity
from evals.run import main as evaluate
from tests.conftest import run_program

SMALL = ["train.steps=2", "train.seq_len=32", "eval.tokens=256", "eval.sample_tokens=1", "eval.every=1", "train.micro_batch=2"]
Train = Callable[..., subprocess.CompletedProcess[str]]


def shards(folder: Path, text: str, *words: str) -> Path:
    folder.with_suffix(".txt").write_text(text)
    assert main([f"input={folder.with_suffix('.txt')}", f"out={folder}", "tokenizer=bytes", *words]) == 0
    return folder


def test_the_total_weighs_sources_as_if_their_share_had_been_scored() -> None:
    one, two = Perplexity(100.0, 50, 100, {0: [100.0, 50.0]}), Perplexity(30.0, 30, 90, {0: [30.0, 30.0]})
    total = combined([(one, 0.75), (two, 0.25)])
    assert total.tokens == 80 and total.nats_per_token == pytest.approx(0.75 * 2.0 + 0.25 * 1.0)
    assert total.nll_nats / total.bytes == pytest.approx((0.75 * 2 + 0.25 * 1) / (0.75 * 2 + 0.25 * 3), rel=1e-2)
    assert total.by_position[0][0] / total.by_position[0][1] == pytest.approx(total.nats_per_token)
    assert combined([(one, 1.0)]) is one
    nothing = Perplexity(bytes=1)
    assert math.isnan(nothing.bits_per_byte) and math.isnan(combined([(nothing, 0.5), (nothing, 0.5)]).bits_per_byte)
    assert combined([(nothing, 0.9), (one, 0.1)]) is one
    three = combined([(one, 0.6), (nothing, 0.2), (two, 0.2)])
    assert (three.nll_nats, three.bytes) == pytest.approx((total.nll_nats, total.bytes))
    far = combined([(Perplexity(9.0, 9, 9, {8: [9.0, 9.0]}, 9), 0.5), (Perplexity(9.0, 9, 9, {8: [9.0, 9.0]}, 13), 0.5)])
    assert far.to_dict()["by_position"][-1]["to"] == 12 and of_report(far.to_dict()).length == 13
    assert names_of(["a/web", "b/web", "c"]) == ["a/web", "b/web", "c"]


def test_a_mixture_is_evaluated_by_source_in_training_and_after(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = shards(tmp_path / "a", "the fox jumps. " * 400), shards(tmp_path / "b", "0123456789 " * 600, "valid_fraction=0.2")
    none = shards(tmp_path / "none", "xyz " * 400, "valid_fraction=0")
    done = train("run", *SMALL, f"data.path={{{a}: 3, {b}: 1, {none}: 1}}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{none} has no held-out documents, so it is not evaluated" in done.stdout
    assert done.stdout.count("weighed as in training; by source: a ") == 2
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())["perplexity"]
    assert scores["sources"].keys() == {"a", "b"} and scores["sources"]["a"]["share"] == 0.75
    nats = [scores["sources"][name]["nats_per_token"] for name in "ab"]
    assert scores["nats_per_token"] == pytest.approx(0.75 * nats[0] + 0.25 * nats[1])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("bits_per_byte/a" in row for row in rows) and any("held_out_loss/b" in row for row in rows)

    words = ["suite=perplexity", "length=32", "device=cpu", f"checkpoint={tmp_path / 'run'}"]
    (tmp_path / "results").mkdir()
    assert evaluate([*words, f"out={tmp_path / 'results'}"]) == 0
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [f"eval-perplexity{part}.json" for part in ("-0", "-1", "")]
    assert not list(tmp_path.glob("results-*")) and capsys.readouterr().out
    assert evaluate([*words, f"out={tmp_path / 'all.json'}"]) == 0
    parts = [json.loads((tmp_path / f"all{part}.json").read_text()) for part in ("-0", "-1", "")]
    assert parts[2]["seconds"] == parts[0]["seconds"] + parts[1]["seconds"] and parts[2]["by_position"][-1]["to"] == 31
    said, whole = capsys.readouterr().out, json.loads((tmp_path / "all.json").read_text())
    (tmp_path / "o.txt").write_text("xyz " * 400)
    assert main([f"input={tmp_path / 'o.txt'}", f"out={tmp_path / 'other'}", "tokenizer=bpe:260"]) == 0
    capsys.readouterr()
    assert evaluate([*words, f"data={a},{tmp_path / 'other'}", "rows=3"]) == 2  # nothing is measured, nothing written beside the weights
    captured = capsys.readouterr()
    assert "source a" not in captured.out and "another tokenizer" in captured.err and "does not look at rows." in captured.err
    assert not list((tmp_path / "run" / "checkpoints").rglob("eval-perplexity*"))
    assert "weighed as in training: by source: a " in said and f"{none} has no held-out documents and is not evaluated" in said
    assert evaluate([*words, f"data={b}", f"out={tmp_path / 'b.json'}"]) == 0
    assert json.loads((tmp_path / "b.json").read_text())["bits_per_byte"] == pytest.approx(whole["sources"]["b"]["bits_per_byte"])


def test_without_held_out_documents_nothing_is_evaluated_and_that_is_said(train: Train, tmp_path: Path) -> None:
    none = shards(tmp_path / "none", "the fox jumps. " * 400, "valid_fraction=0")
    assert open_held_out(none) is None
    done = train("run", *SMALL, f"data.path={none}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert (
        done.stdout.count(
            f"{none} has no held-out documents, so this run is not evaluated; prepare the data with valid_fraction above zero."
        )
        == 1
    )
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["perplexity"] is None
    for suite in ("perplexity", "quick"):
        done = run_program(
            ["-m", "evals.run", f"checkpoint={tmp_path / 'run'}", f"suite={suite}", f"data={none}", f"out={tmp_path / suite}"]
        )
        assert "has no held-out documents" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_single_text_file_is_trained_and_evaluated_on(train: Train, tmp_path: Path) -> None:
    """The first thing that people try."""
    text = "".join(f"Line {i} of the only file there is.\n" for i in range(400))
    folder = shards(tmp_path / "one", text)
    valid = open_held_out(folder)
    assert valid is not None and valid.n_documents == 1
    last = valid.tokenizer().decode(valid.document(0)[0].tolist(), skip_special_tokens=True)
    assert text.endswith(last) and last.startswith("Line ") and len(text) / 20 < len(last) < len(text) / 5
    done = train("run", *SMALL, f"data.path={folder}")
    assert done.returncode == 0 and "held-out bits per byte" in done.stdout, done.stderr[-2000:]
