"""Sweeps: a process and a folder for each job, failures and interrupts that leave the rest alone, mistakes before anything starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.conftest import ROOT, SMALL, environment, run_program
from training.config.cli import checked, compose_config, flags_of, run
from training.errors import UserError
from training.sweep import COMMAND, Sweep, label_of, quoted


@pytest.mark.parametrize("text", ["runs/a=b", "it's", "a\\", "a\\'b", "x y,z", "[1]", "ä"])
def test_a_quoted_text_is_read_back_to_the_letter(text: str) -> None:
    assert OverridesParser.create().parse_overrides([f"run_dir={quoted(text)}"])[0].value() == text


def test_a_job_is_named_by_what_tells_it_from_the_others() -> None:
    assert label_of(["optim.lr=0.001", "model=paragru"]) == "model=paragru__optim.lr=0.001"
    assert label_of(["experiment=synthetic/parity", "+model.x='a b'"]) == "experiment=synthetic-parity__model.x=a-b"
    assert label_of(["model.pattern=[mamba2,attention]"]) == "model.pattern=mamba2-attention"
    long = [f"model.pattern=[{','.join(['attention'] * 40 + [name])}]" for name in "ab"]
    assert len({label_of([text]) for text in long}) == 2 and all(len(label_of([text])) < 255 for text in long)


@pytest.mark.parametrize(
    "words, part",
    [
        (["model=paragru,nosuch"], "there is no configs/model/nosuch.yaml"),
        (["optim.lr=1e-3,fast"], "optim.lr must be a number"),
        (["train.micro_batch=1,3"], "(job train.micro_batch=3)"),
        (["optim.lrr=1,2"], "did you mean 'lr'"),
        (["seed=1,1"], "share the run folder seed=1"),
        (["hydra/launcher=nosuch", "seed=1,2"], "pip install hydra-nosuch-launcher"),
        (["optim.lr=interval(1e-4,1e-2)"], "hydra/sweeper=optuna"),
    ],
)
def test_a_mistake_in_one_job_is_told_before_any_starts(words: list[str], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Sweep([*words, f"run_dir={tmp_path / 'sweep'}"], ["-m"], compose_config, checked)
    assert len(caught.value.problems) == 1 and part in str(caught.value) and not (tmp_path / "sweep").exists()


def test_several_values_want_a_sweep_and_flags_may_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="several runs take -m"):
        compose_config(["seed=1,2"])
    asked, flags = flags_of(["seed=1,2", "-m", "name=a"])
    assert asked.multirun and asked.overrides == ["seed=1,2", "name=a"] and flags == ["-m"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "--cfg", "job", "seed=1"])
    assert run(lambda: None) == 2
    with pytest.raises(UserError, match="without dashes: model=paragru"):
        flags_of(["--model=paragru"])


def test_a_sweep_is_not_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=COMMAND):
        Sweep(["seed=1,2"], ["-m"], compose_config, checked)


@pytest.mark.slow
def test_a_failed_job_leaves_the_rest_alone_and_finished_ones_are_left_out(demo_shards: Path, tmp_path: Path) -> None:
    there, folder = set(ROOT.iterdir()), tmp_path / "sweep"
    words = ["train.py", *SMALL, "train.steps=2", f"data.path={tmp_path / 'nowhere'},{demo_shards}", "-m", f"run_dir={folder}"]
    done = run_program(words)
    assert done.returncode == 1, done.stdout + done.stderr
    failed, trained = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: (p / "checkpoints").exists())
    assert json.loads((trained / "job.json").read_text())["status"] == "finished" and (trained / "log.txt").is_file()
    record = json.loads((failed / "job.json").read_text())
    assert record["status"] == "failed" and "holds no token shards" in record["said"]
    lines = (folder / "sweep.txt").read_text().splitlines()
    assert lines[1].split()[1] == trained.name and lines[2].endswith("failed") and "holds no token shards" in lines[3]
    assert lines[0] in done.stdout and (folder / "sweep.png").stat().st_size > 1000 and set(ROOT.iterdir()) == there
    again = run_program(words)
    assert again.returncode == 1 and f"{trained.name}: finished before" in again.stdout


WAITS = """
import pathlib, signal, sys, time
folder = pathlib.Path(next(w for w in sys.argv if w.startswith("run_dir="))[8:].strip("'"))
def save(*_):
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGINT, save)
print("waiting", flush=True)
time.sleep(100)
"""


def test_an_interrupted_sweep_lets_its_job_save_and_shows_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    extra = {COMMAND: f"{sys.executable} {tmp_path / 'waits.py'}"}
    process = subprocess.Popen(
        [sys.executable, "train.py", *SMALL, "-m", "seed=1,2", f"run_dir={tmp_path / 'sweep'}"],
        cwd=ROOT, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "waiting" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait() == 75
    assert (tmp_path / "sweep" / "seed=1" / "saved").exists() and "Traceback" not in rest
    assert [line.split()[-1] for line in rest.splitlines() if line.startswith(("1 ", "2 "))] == ["stopped", "started"]
    assert "the same command goes on" in rest


@pytest.mark.slow
def test_a_launcher_of_hydra_runs_jobs_side_by_side(demo_shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [
        *SMALL,
        "train.steps=2",
        f"data.path={demo_shards}",
        "-m",
        "hydra/launcher=joblib",
        "seed=1,2",
        f"run_dir={tmp_path / 'sweep'}",
    ]
    done = run_program(["train.py", *words], started=True)
    assert done.returncode == 0 and done.stdout.count("finished") == 2 and "[2] step 2/2" in done.stdout, done.stdout + done.stderr
