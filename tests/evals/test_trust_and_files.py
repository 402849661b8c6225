"""Code in a model's folder, folders that cannot be written to, progress, and the figures of a report."""

from __future__ import annotations

import errno
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evals import run as program
from evals.adapters.base import ItemError
from evals.adapters.load import load_adapter
from evals.adapters.trust import code_hash, may_run_code
from evals.measures.perplexity import Perplexity, bucket_sums
from evals.progress import Progress
from evals.report.figures import grids_figure, pyplot, remembrance_figure
from evals.report.page import Page
from evals.report.records import Records
from evals.report.sections import drawn, write_report
from evals.report.sections import main as report
from evals.run import main, where_to_write
from models.hub.custom import custom, write_code
from tests.evals.conftest import llama, own
from training.errors import UserError

RAN = "code_that_ran.txt"


def write_foreign(folder: Path) -> Path:
    """A Llama whose folder brings a class of its own, which leaves a file behind when it is run."""
    llama().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "somebodys", "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n\n"
        f"Path({str(folder / RAN)!r}).write_text('ran')\n\n\n"
        'class Config(LlamaConfig):\n    model_type = "somebodys"\n\n\nclass Model(LlamaForCausalLM):\n    config_class = Config\n'
    )
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the export writes it for a model that is no stock class."""
    folder, model = tmp_path_factory.mktemp("ours"), own("g", n_layers=1)
    target = custom(model.config, 64)
    write_code(model.config, folder)
    (folder / "config.json").write_text(json.dumps(target.config))
    shaped = {
        target.name(k): v[:, None] if k.endswith("conv1d.weight") else v
        for k, v in model.state_dict().items()
        if k != "head.weight" or not model.config.tie_embeddings
    }
    save_file({k: v.contiguous() for k, v in shaped.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_code_in_a_folder_runs_only_when_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_foreign(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"code of its own \(theirs.py\).*trust_remote_code=true"):
        load_adapter(str(folder))
    assert main([f"checkpoint={folder}", "suite=quick", f"out={tmp_path / 'out'}", "device=cpu"]) == 2
    assert "trust_remote_code=true" in capsys.readouterr().err and not (folder / RAN).exists()
    adapter = load_adapter(str(folder), trust_remote_code=True)
    assert (folder / RAN).exists() and adapter.trusted and "Model" in adapter.kind
    before = adapter.content_hash()
    (folder / "theirs.py").write_text((folder / "theirs.py").read_text() + "\n# changed\n")
    assert adapter.content_hash() != before  # other code, other results


def test_a_class_that_transformers_has_needs_no_code(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "theirs.Model"}}))
    (tmp_path / "theirs.py").write_text("raise SystemExit('ran')\n")
    assert not may_run_code(tmp_path, False) and "Llama" in load_adapter(str(tmp_path)).kind


def test_a_tokenizer_of_code_is_a_sentence(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}}))
    (tmp_path / "theirs.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / RAN)!r}).write_text('ran')\n")
    with pytest.raises(ItemError, match="code of its own.*trust_remote_code=true"):
        load_adapter(str(tmp_path)).need_coder()
    assert not (tmp_path / RAN).exists()


def test_our_own_code_runs_to_the_letter_and_no_further(ours: Path, tmp_path: Path) -> None:
    adapter = load_adapter(str(ours))
    assert adapter.kind == "transformers EverywhenForCausalLM"
    ids = torch.arange(1, 20)[None]
    model = own("g", n_layers=1)
    with torch.no_grad():
        torch.testing.assert_close(adapter.logits(ids, adapter.start(1))[0], model(ids).logits, rtol=1e-3, atol=1e-3)

    def changed(name: str, change: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(ours, folder)
        change(folder)
        return folder

    def edit(folder: Path) -> None:
        path = folder / "modeling_everywhen.py"
        path.write_text(path.read_text() + "\n# one line more\n")

    def another_model(folder: Path) -> None:  # the code of a model with other parts
        write_code(own("m", n_layers=1).config, folder)

    def add(folder: Path) -> None:
        (folder / "more.py").write_text("")

    def elsewhere(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoModelForCausalLM"] = "org/name--modeling_everywhen.EverywhenForCausalLM"
        (folder / "config.json").write_text(json.dumps(config))

    def tokenizer(folder: Path) -> None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["org/name--x.Y", None]}}))

    for name, change in (("edit", edit), ("other", another_model), ("add", add), ("elsewhere", elsewhere), ("tokenizer", tokenizer)):
        with pytest.raises(UserError, match="trust_remote_code=true"):
            may_run_code(changed(name, change), False)
    assert code_hash(ours) and not code_hash(tmp_path / "nowhere")


def test_a_pickle_is_refused_even_when_code_is_trusted(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "theirs")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for trusted in (False, True):
        with pytest.raises(UserError, match="holds a pickle"):
            load_adapter(str(folder), trust_remote_code=trusted)
    assert not (folder / RAN).exists()


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes one folder refuse new files, as a read-only disk does; root may write anywhere else."""
    import tempfile

    real = tempfile.TemporaryFile
    closed: list[Path] = []

    def refuse(*args: Any, dir: Any = None, **more: Any) -> Any:
        if any(Path(dir).resolve().is_relative_to(folder.resolve()) for folder in closed):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(*args, dir=dir, **more)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    return closed.append


def test_results_of_a_read_only_checkpoint_go_elsewhere(
    read_only: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a" / "run" / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    values = {"suite": "perplexity", "out": None}
    assert where_to_write(values, folder) == folder / "eval-perplexity.json"
    read_only(tmp_path / "a")
    assert (
        where_to_write(values, folder) == Path("runs/evals/run-step-00000010/eval-perplexity.json")
        and "cannot be written to" in capsys.readouterr().out
    )
    assert where_to_write({**values, "out": str(tmp_path / "b" / "x.json")}, folder) == tmp_path / "b" / "x.json"
    with pytest.raises(UserError, match="cannot be written to .* out="):
        where_to_write({**values, "out": str(tmp_path / "a" / "x.json")}, folder)


def test_a_suite_is_refused_before_anything_is_measured(hf_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for out in ("/proc/out", tmp_path / "file" / "out"):
        assert main([f"checkpoint={hf_folder}", "suite=quick", f"out={out}", "device=cpu"]) == 2
        assert "cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, part",
    [
        (["checkpoint=x", "text=demo"], "There is no x"),
        (["checkpoint=x,y", "text=demo"], "None of the models"),
        (["checkpoint=x", "device=tpu"], "error: device is 'tpu'"),  # and not a key of train.py
        (["checkpoint=x", "device=tpu", "text=demo"], "error: device is 'tpu'"),
        (["checkpoint=x", "suite=quick", "text=a.txt", "data=b"], "one of them"),
        (["checkpoint=x", "suite=quick", "add_bos_token=maybe"], "add_bos_token"),
        (["checkpoint=x", "suite=quick", "trust_remote_code=yes"], "trust_remote_code must be true or false"),
    ],
)
def test_more_mistakes_are_sentences(
    words: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2 and part in capsys.readouterr().err


def test_a_folder_without_measurements_gets_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "meta.json").write_text("{}")
    assert report([str(tmp_path)]) == 2 and "is no folder of measurements" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


def test_progress_is_plain_lines_of_the_first_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> list[str]:
        with Progress("perplexity", "rows", every=True) as progress:
            for done in range(1, 101):
                progress(done, 100)
        return capsys.readouterr().err.splitlines()

    lines = told()
    assert len(lines) == 2 and lines[0].startswith("perplexity: 1 of 100 rows") and lines[1].startswith("perplexity: 100 of 100 rows")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert told() == []
    monkeypatch.setenv("RANK", "0")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    told()
    assert "perplexity" in screen.getvalue() and "100%" in screen.getvalue()


def test_places_of_a_row_are_named_by_what_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    result = Perplexity(nll_nats=1.0, tokens=5, bytes=5, length=5)
    bucket_sums(np.ones((1, 5)), 0, result.by_position)
    assert [(b["from"], b["to"], b["tokens"]) for b in result.to_dict()["by_position"]] == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 4, 1)]
    report = {
        "checkpoint": "x",
        "text": {"name": "y"},
        "seen": {"status": "held out"},
        "baselines_bits_per_byte": {"unigram": 1.0, "bigram": 1.0},
    }
    program._show({**report, **result.to_dict()}, Path("z"))
    shown = capsys.readouterr().out
    assert "0-1" not in shown and "1-1" not in shown and "\n  2-3 " in shown and "(held out)" in shown


def grid(length: int, accuracy: float) -> dict[str, Any]:
    beside = {"chance": 1e-5, "copies the end": 0.25}
    cells = [{"depth": d, "accuracy": accuracy, "n": 4, "low": 0, "high": 1, "prompt_tokens": length} for d in (0.25, 0.75)]
    return {
        "task": "passkey",
        "length": length,
        "cells": cells,
        "accuracy": accuracy,
        "n": 8,
        "low": 0.0,
        "high": 1.0,
        "without_reading": beside,
    }


def write_items(out: Path, model: str, results: list[tuple[str, str, dict[str, Any]]]) -> None:
    about = {"kind": "k", "parameters": 1, "train_length": 4, "carry": "chunks", "precision": "fp32"}
    (out / model / "items").mkdir(parents=True, exist_ok=True)
    for name, kind, result in results:
        record = {
            "item": name,
            "kind": kind,
            "status": "done",
            "result": result,
            "model": about,
            "environment": {"device": "cpu", "torch": "2", "commit": "c"},
        }
        (out / model / "items" / f"{name}.json").write_text(json.dumps(record))


def test_a_report_compares_models_and_names_their_text(tmp_path: Path) -> None:
    text = {"name": "books", "sha256": "ab" * 32, "documents": 2, "bytes": 10, "note": ""}
    document = {"documents": 2, "tokens": 5, "bytes": 10, "bits_per_byte": 1.0, "perplexity": 2.0, "text": text}
    for model, status in (("a", "held out"), ("b", "partly trained on")):
        seen = {"status": status, "share": 0.37 if model == "b" else 0.0, "why": "Because."}
        write_items(tmp_path, model, [("documents", "documents", {**document, "seen": seen}), ("passkey-256", "retrieval", grid(256, 0.0))])
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "Held-out documents" not in page and "| b | books | abababababab | no: partly trained on (37 % of it) |" in page
    assert "| a | books | abababababab | yes |" in page and "ab" * 32 in page and "different texts" not in page
    assert "Nobody found a key" in page and not (tmp_path / "plots" / "passkey.png").exists()
    assert "| 0.001 | 25 (copies the end) |" in page
    other = {**document, "text": {**text, "sha256": "cd" * 32}, "seen": {"status": "not known", "share": None, "why": "Because."}}
    write_items(tmp_path, "c", [("documents", "documents", other), ("passkey-256", "retrieval", grid(256, 0.5))])
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "different texts" in page and "| c | books | cdcdcdcdcdcd | not known |" in page
    assert (tmp_path / "plots" / "passkey.png").exists() and page.count("passkey.png") == 1


def test_results_that_cannot_be_drawn_are_named_and_the_others_drawn(tmp_path: Path) -> None:
    """Of another version, or changed by hand: the report of an evaluation that has just ended must not fail for them."""
    document = {"documents": 2, "tokens": 5, "bytes": 10, "bits_per_byte": 1.0, "perplexity": 2.0}
    write_items(tmp_path, "a", [("documents", "documents", document), ("position-prose", "position", {"prompt": "prose", "rows": 1})])
    write_items(tmp_path, "b", [("documents", "documents", {"text": 3}), ("passkey-256", "retrieval", grid(256, 0.5))])
    for i, text in enumerate(("{}", "[]", "null", "", '{"status": "done"}', '{"item": "x", "kind": "position", "status": "failed"}')):
        (tmp_path / "a" / "items" / f"odd-{i}.json").write_text(text)
    write_report(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| a | - | - | not known | 2 | 5 |" in page and (tmp_path / "plots" / "passkey.png").exists()
    assert "| b | documents | its JSON is of another version or was changed (KeyError" in page and "| a | position-prose | its JSON" in page
    assert "odd" not in page


def test_results_that_cannot_be_drawn_side_by_side_do_not_end_the_report() -> None:
    def draw(page: Page, plt: Any, records: Records) -> None:
        page.table(["x"], [[x] for x in sorted(r["result"]["x"] for items in records.values() for r in items)])

    records = {model: [{"item": f"{model}{x}", "result": {"x": x}} for x in xs] for model, xs in (("a", [2, "3"]), ("b", [1]))}
    page = Page()
    lost = drawn(page, None, draw, records)
    assert page.parts == [("table", (["x"], [["1"], ["2"]]))] and [row[:2] for row in lost] == [["a", "a3"]]


def test_figures_are_scaled_to_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pyplot()
    figures: list[Any] = []

    def png(plt: Any, figure: Any) -> bytes:
        figures.append(figure)
        return b"png"

    monkeypatch.setattr("evals.report.figures.png", png)
    curve = [{"dropped": d, "distance": 0.05 * d / 4, "low": None, "high": None} for d in range(5)]
    assert remembrance_figure(plt, [("a", {"length": 8, "curve": curve})]) == b"png"
    assert 0.05 < figures[-1].axes[0].get_ylim()[1] < 0.06
    assert grids_figure(plt, {"a": [grid(256, 0.0), grid(512, 0.0)]}, "t") is None
    assert (
        grids_figure(plt, {"a": [grid(256, 0.5)], "b": [grid(256, 0.0), grid(512, 0.2)], "c": [grid(512, 1.0)], "d": [grid(256, 0.1)]}, "t")
        == b"png"
    )
    panels = [axes for axes in figures[-1].axes if axes.get_visible() and axes.images]
    assert [axes.get_title() for axes in panels] == ["a", "b", "c", "d"]
    assert len({(axes.images[0].norm.vmin, axes.images[0].norm.vmax, axes.get_xlim()) for axes in panels}) == 1
    for figure in figures:
        plt.close(figure)
