"""Runs on generated tasks: resumed ones equal uninterrupted ones, evaluation against models whose answers are known, the table's script."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.synthetic import build_task
from data.synthetic.task import Draws
from evals.measures.tracking import Counts, accuracy_by_length, count, default_lengths
from evals.state_tracking import DEFAULTS, evaluate_checkpoint, problems_of
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies.cells import finish
from tests.conftest import ROOT, run_program
from training.config.arguments import parse_arguments
from training.errors import UserError


class Machine(torch.nn.Module):
    """Stands in for a model: `right` gives the parity with a carried state, otherwise always `constant`."""

    whole_beyond = None

    def __init__(self, right: bool, constant: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.config = torch.nn.Embedding(2, 1), SimpleNamespace(vocab_size=2)
        self.right, self.constant = right, constant

    def init_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1, dtype=torch.long)

    def forward(self, x: torch.Tensor, state: Any = None) -> SimpleNamespace:
        total = x.cumsum(1) + (0 if state is None else state)
        one = (total % 2).float() if self.right else torch.full_like(x, self.constant, dtype=torch.float32)
        return SimpleNamespace(logits=torch.stack([1 - one, one], -1), state=None if state is None else total[:, -1:])


@pytest.mark.parametrize("length,chunk", [(1, 5), (37, 512), (37, 5), (40, 8)])
def test_a_right_machine_is_right_and_a_constant_one_as_good_as_its_label(length: int, chunk: int) -> None:
    task = build_task({"name": "parity"})
    row = count(Machine(True), task, length, sequences=50, batch=7, chunk=chunk).to_dict(length)
    assert row["accuracy"] == row["last"] == row["exact"] == 1 and row["ci95"] == [1, 1] and row["answers"] == 50 * length
    row = count(Machine(False), task, length, sequences=50, batch=7, chunk=chunk).to_dict(length)
    _, labels = task.sample(Draws(0, "valid", np.arange(50)), length)
    zeros = labels == 0
    assert row["accuracy"] == pytest.approx(zeros.mean()) and row["last"] == pytest.approx(zeros[:, -1].mean())
    assert row["exact"] == pytest.approx(zeros.all(1).mean()) and row["chance"] == pytest.approx(max(zeros.mean(), 1 - zeros.mean()))
    spread = zeros.mean(1).std() / 50**0.5
    assert row["ci95"] == pytest.approx([max(0, zeros.mean() - 1.96 * spread), min(1, zeros.mean() + 1.96 * spread)])
    places = [
        p["accuracy"] * ((np.arange(length) * 16 // length) == np.arange(length)[p["from"]] * 16 // length).sum()
        for p in row["by_position"]
    ]
    assert sum(places) == pytest.approx(zeros.sum() / 50)


def test_counts_of_ranks_add_up() -> None:
    task = build_task({"name": "khop", "hops": 1, "symbols": 2})
    whole = count(Machine(False, 1.0), task, 13, sequences=41, batch=6)
    parts = [count(Machine(False, 1.0), task, 13, sequences=41, batch=6, rank=r, world_size=3) for r in range(3)]
    total = Counts.from_flat(np.sum([p.flat() for p in parts], axis=0).tolist())
    assert total.labels == whole.labels
    assert (total.sequences, total.asked, total.right, total.all_right) == (41, whole.asked, whole.right, whole.all_right)
    assert total.share == pytest.approx(whole.share) and total.by_place == whole.by_place


STRETCHED = {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0, "original_max_position_embeddings": 16}}


@pytest.mark.parametrize(
    "mixer",
    [
        {"type": "rnn"},
        {"type": "mamba2", "d_state": 8, "head_dim": 16},
        {"type": "attention", "n_heads": 2},
        {"type": "attention", "n_heads": 2, **STRETCHED},
    ],
    ids=["rnn", "mamba2", "attention", "stretched"],
)
def test_chunks_give_what_the_whole_gives(mixer: dict[str, Any]) -> None:
    task = build_task({"name": "word_problem"})
    model = LanguageModel(ModelConfig(vocab_size=6, d_model=16, n_layers=2, pattern=["m"], mixers={"m": mixer}, d_ff=0, init_std=0.3))
    model.init_weights(0)
    whole, cut = (count(model, task, 53, sequences=9, chunk=chunk).to_dict(53) for chunk in (512, 7))
    assert whole == cut and model.training


def test_what_goes_wrong_at_one_length_is_said_there() -> None:
    task = {"name": "mqar", "pairs": 2, "symbols": 4}
    model = Machine(False)
    model.config = SimpleNamespace(vocab_size=4)
    model.forward = lambda x, state=None: SimpleNamespace(  # type: ignore[method-assign]
        logits=torch.full((*x.shape, 4), float("nan") if x.shape[1] == 9 else 1.0), state=state
    )
    rows = accuracy_by_length(model, task, [8, 9, 3], sequences=4)["lengths"]
    assert rows[0]["answers"] == 8 and "not finite" in rows[1]["error"] and "too short" in rows[2]["error"]
    model.config = SimpleNamespace(vocab_size=3)
    assert "has 3 tokens" in accuracy_by_length(model, task, [8], sequences=4)["lengths"][0]["error"]
    with pytest.raises(UserError):
        accuracy_by_length(model, {"name": "nothing"}, [8])
    with pytest.raises(UserError) as caught:
        evaluate_checkpoint(model, {"folder": "here", "run": {"data": {"reader": "windows", "path": "x"}}})
    assert "here was not trained on a generated task" in str(caught.value)


def test_arguments() -> None:
    values = parse_arguments(["checkpoint=x", "lengths=[10,20]", "sequences=3", "seed=0"], DEFAULTS, problems_of)
    assert values["lengths"] == [10, 20] and values["sequences"] == 3
    with pytest.raises(UserError) as caught:
        parse_arguments(["lenghts=1", "lengths=a", "batch=0", "precision=fp8", "seed=2000000"], DEFAULTS, problems_of)
    assert len(caught.value.problems) == 6 and "'lengths'" in caught.value.problems[0]
    assert default_lengths(10, build_task({"name": "mqar"})) == [10, 20, 40, 80]


def test_a_run_that_was_cut_short_equals_one_that_was_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = [
        *("train.py", "experiment=synthetic/parity", "train.device=cpu", f"run_dir={run}", "train.steps=6", "train.seq_len=19"),
        *(
            "train.global_batch=6",
            "train.micro_batch=3",
            "data.curriculum=21",
            "checkpoint.every=3",
            "eval.every=2",
            "eval.tokens=500",
            "seed=5",
        ),
    ]
    done = run_program(command)
    assert done.returncode == 0, done.stderr
    assert "accuracy after step 2" in done.stdout and "accuracy on {'name': 'parity'" in done.stdout
    first = {name: (run / name).read_text() for name in ("metrics.jsonl", "eval.json")}
    weights = (run / "checkpoints/step-00000006/model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step-00000006")
    done = run_program(command)
    assert done.returncode == 0 and "at step 3 of 6" in done.stdout, done.stdout + done.stderr
    assert (run / "checkpoints/step-00000006/model.safetensors").read_bytes() == weights
    keep = ("step", "loss", "grad_norm", "lr", "accuracy", "accuracy_last")
    rows = [
        [
            {k: v for k, v in row.items() if k in keep}
            for row in map(json.loads, text.splitlines())
            if not row.keys() & {"saved_step", "startup"}
        ]
        for text in (first["metrics.jsonl"], (run / "metrics.jsonl").read_text())
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 9
    assert json.loads(first["eval.json"]) == json.loads((run / "eval.json").read_text())

    from evals.state_tracking import main  # the same numbers from the checkpoint, by the program of its own

    result = json.loads(first["eval.json"])["state_tracking"]
    sequences = result["lengths"][1]["sequences"]
    assert main([f"checkpoint={run}", "lengths=19", f"sequences={sequences}", "seed=5", f"out={tmp_path / 'o.json'}", "device=cpu"]) == 0
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["task"] == result["task"] and report["train_length"] == 19 and report["accuracy"] == pytest.approx(result["accuracy"])
    assert main([f"checkpoint={tmp_path / 'nowhere'}"]) == 2
    assert "error: There is no" in capsys.readouterr().err


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("state_tracking_table", ROOT / "scripts/studies/tracking.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "mixer", ["paragru", "paralstm", "mamba2", "transformer", "torch_gru", "torch_lstm", "hybrid", "gru", "lstm", "delta_2"]
)
def test_every_mixer_of_the_table_trains(script: ModuleType, mixer: str) -> None:
    values = script.arguments(["length=16", "steps=20"]) | {"batch": 4}
    settings = script.settings_of("S3", mixer, values)
    result = finish(script.train_cell(settings, 0, torch.device("cpu"), 60.0, 20))
    assert result["steps"] == 20 and result["ended"] == "steps" and [r["length"] for r in result["lengths"]] == [8, 16, 32, 64, 128]
    assert result["accuracy"] == result["lengths"][1]["accuracy"] and len(result["curve"]) == 2


def test_the_table_solves_parity_goes_on_and_draws(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = script.arguments(
        ["--tasks", "parity", "mixers=torch_gru", "--seeds=2", "length=8", "steps=1000", "sequences=50", f"out={tmp_path}"]
    )
    values |= {"batch": 64, "workers": 1, "streams": 2}
    (tmp_path / "cells").mkdir()
    cells, deadline = [("parity", "torch_gru", 0), ("parity", "torch_gru", 1)], script.time.time() + 300
    taken = script.multiprocessing.get_context("spawn").Value("i", 1)
    script.work(values, cells, taken, deadline, "cpu", "")
    table = script.collect(values)
    assert [c["seed"] for c in table] == [1] and table[0]["ended"] == "solved" and table[0]["accuracy"] > 0.99
    assert script.read_cell(tmp_path, "parity", "torch_gru", 1, script.settings_of("parity", "torch_gru", values)) is not None
    assert script.read_cell(tmp_path, "parity", "torch_gru", 1, script.settings_of("parity", "torch_gru", values | {"batch": 32})) is None
    script.report(values, "cpu", 1.0)
    text = (tmp_path / "table.md").read_text()
    assert re.search(r"\| torch_gru \| [\d,]+ \| 100.0 \(100.0 of 1\)", text) and (tmp_path / "table.png").stat().st_size > 1000
    assert json.loads((tmp_path / "table.json").read_text())["cells"][0]["seed"] == 1
    with pytest.raises(UserError) as caught:
        script.arguments(["tasks=parity,nope", "mixers=x", "seeds=0", "minuts=3"])
    assert len(caught.value.problems) == 4
    assert "100.0" in capsys.readouterr().out


def test_cells_are_judged_over_thousands_of_answers_and_can_have_the_published_settings() -> None:
    from scripts.studies.cells import PUBLISHED, answers_of, settings_of, stages_of

    mqar, parity = build_task({"name": "mqar"}), build_task({"name": "parity"})
    assert answers_of(mqar, 100) == 2 and answers_of(parity, 100) == 100
    assert stages_of(parity, 100) == [12, 25, 50, 100] and stages_of(parity, 100, 0.0) == [100]
    values = {"layers": 1, "batch": 64, "steps": 0, "length": 100}
    assert settings_of("mqar", "paragru", values)["batch"] == 128
    published = settings_of("mqar", "paragru", values | {"published": True})
    assert {key: published[key] for key in PUBLISHED} == PUBLISHED and published["steps"] * published["batch"] == 3000 * published[
        "samples"
    ]
