"""Whole runs of train.py: resume, kills, ranks, faults and mistakes. Losses are compared to the last bit where nothing may differ."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL, free_port, run_program, start_program

Train = Callable[..., subprocess.CompletedProcess[str]]
QUIET = ["eval=end", "eval.tokens=256"]


def launcher(name: str) -> list[str]:
    """Two CPU ranks on this machine, on a port of their own."""
    port = free_port()
    if name == "deepspeed":
        return ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    return ["-m", "torch.distributed.run", "--master_port", port, "--nproc_per_node", "2"]


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if "loss" in r]
    assert steps == sorted(set(steps)), "a step was written twice or out of order"
    return {r["step"]: r["loss"] for r in rows if "loss" in r}


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_stop_and_resume_equals_an_uninterrupted_run_bit_for_bit(train: Train, tmp_path: Path) -> None:
    ok(train("whole", *QUIET, "train.steps=8"))
    ok(train("parts", *QUIET, "train.steps=8", "checkpoint.milestones=[3]", "checkpoint.at_end=false"))
    done = ok(train("parts", *QUIET, "train.steps=8"))
    assert "resuming from" in done and "step-00000003" in done
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["faults"] == {"recent": list(losses(tmp_path / "whole").values()), "skips": 0}  # those of the steps before it stopped, too
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "eval.json", "samples.txt"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_random_moments_loses_nothing(train: Train, demo_shards: Path, tmp_path: Path, seed: int) -> None:
    ok(train("whole", *QUIET, "train.steps=30"))
    run = [f"data.path={demo_shards}", f"run_dir={tmp_path / 'killed'}"]
    command = ["train.py", *SMALL, *run, *QUIET, "train.steps=30", "checkpoint.every=1"]
    chance, metrics = random.Random(seed), tmp_path / "killed" / "metrics.jsonl"
    for _ in range(3):
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        process = start_program(command)
        while process.runs() and not (metrics.exists() and len(metrics.read_text().splitlines()) > before + 2):
            time.sleep(0.01)
        time.sleep(chance.random() * 0.3)  # saving takes most of a step here, so some kills fall into a save
        process.kill(signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL
    ok(train("killed", *QUIET, "train.steps=30", "checkpoint.every=1"))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_sigterm_saves_and_exits_cleanly(train: Train, demo_shards: Path, tmp_path: Path) -> None:
    process = start_program(["train.py", *SMALL, f"data.path={demo_shards}", f"run_dir={tmp_path / 'run'}", *QUIET, "train.steps=100000"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.runs()
        time.sleep(0.05)
    process.kill(signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 75 and "stopped by SIGTERM" in done.stdout
    step = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "COMPLETE.json").exists()


@pytest.fixture(scope="module")
def one(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one rank, which runs without ZeRO whatever stage is asked for."""
    run = tmp_path_factory.mktemp("one") / "run"
    words = [*SMALL, *QUIET, f"data.path={demo_shards}", f"run_dir={run}", "train.steps=6", "train.micro_batch=4", "deepspeed=zero3"]
    assert "no ZeRO on a single rank" in ok(run_program(["train.py", *words]))
    return losses(run)


@pytest.mark.slow
@pytest.mark.parametrize("stage,launched_by", [(0, "deepspeed"), (1, None), (2, None), (3, None)])
def test_two_ranks_give_the_curve_of_one(train: Train, one: dict[int, float], tmp_path: Path, stage: int, launched_by: str | None) -> None:
    # torchrun itself starts the ranks of test_faults.py that hang
    started: dict[str, Any] = {"launcher": launcher(launched_by)} if launched_by else {"ranks": 2}
    ok(train("two", *QUIET, "train.steps=6", "train.micro_batch=2", f"deepspeed=zero{stage}", **started))
    two = losses(tmp_path / "two")
    assert one.keys() == two.keys() and all(abs(one[s] / two[s] - 1) < 1e-5 for s in one)


@pytest.mark.slow
def test_two_ranks_to_one_to_two_and_across_zero_stages(train: Train, tmp_path: Path) -> None:
    first = [*QUIET, "train.micro_batch=2", "schedule=constant"]
    ok(train("whole2", *first, "train.steps=9"))
    ok(train("moved", *first, "train.steps=3", "deepspeed=zero2", ranks=2))
    ok(train("moved", *first, "train.steps=5", "deepspeed=zero0"))
    ok(train("moved", *first, "train.steps=7", "deepspeed=zero3", ranks=2))
    ok(train("moved", *first, "train.steps=9", "deepspeed=zero1"))
    whole, moved = losses(tmp_path / "whole2"), losses(tmp_path / "moved")
    assert whole.keys() == moved.keys() and all(abs(whole[s] / moved[s] - 1) < 1e-5 for s in whole)


def test_gradient_accumulation_changes_nothing(train: Train, tmp_path: Path) -> None:
    for micro in (1, 4):
        ok(train(f"micro{micro}", *QUIET, "train.steps=4", f"train.micro_batch={micro}", "deepspeed=zero0"))
    a, b = losses(tmp_path / "micro1"), losses(tmp_path / "micro4")
    assert all(abs(a[s] / b[s] - 1) < 1e-5 for s in a)


def test_bf16_stream_reader_compile_free_switches_and_services(train: Train, tmp_path: Path) -> None:
    out = ok(
        train(
            "run",
            "train.precision=bf16",
            "data.reader=stream",
            "train.activation_checkpointing=full",
            "logging.wandb=offline",
            "logging.tensorboard=true",
            "schedule=wsd",
            "train.steps=null",
            "train.tokens=384",
            WANDB_MODE="offline",
        )
    )
    assert "3/3" in out and len(losses(tmp_path / "run")) == 3
    assert list((tmp_path / "run").glob("tensorboard/events*")) and list((tmp_path / "run").glob("wandb/offline-run*"))


def test_a_damaged_checkpoint_is_passed_over_and_a_torn_one_is_never_loaded(train: Train, tmp_path: Path) -> None:
    ok(train("run", *QUIET, "checkpoint.every=2"))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000004"]
    weights = folder / "step-00000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    (folder / "step-00000009").mkdir()
    out = ok(train("run", *QUIET, "train.steps=5"))
    assert "does not have the content" in out and "resuming from" in out and "step-00000002" in out
    left = sorted(folder.iterdir())
    for weights in folder.glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    mistake(train("run", *QUIET, "train.steps=6"), "Every checkpoint of")  # and does not begin anew, as if there were none
    assert sorted(folder.iterdir()) == left


def mistake(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_mistakes_with_data_and_checkpoints_are_sentences(train: Train, demo_shards: Path, tmp_path: Path) -> None:
    mistake(train("a", f"data.path={tmp_path / 'none'}"), "python -m data.prepare")
    cut = tmp_path / "cut"
    shutil.copytree(demo_shards, cut)
    with open(cut / "train-00000.bin", "r+b") as file:
        file.truncate(1000)
    mistake(train("b", f"data.path={cut}"), "bytes instead of")
    ok(train("c", *QUIET, "train.steps=1"))
    written = (tmp_path / "c" / "config.yaml").read_text()
    mistake(train("c", *QUIET, "size.d_model=64"), "holds another model")
    assert (tmp_path / "c" / "config.yaml").read_text() == written
    mistake(train("d", "train.device=cuda"), "sees no CUDA device")
    mistake(train("e", "train.seq_len=10000000"), "shorten it")
    mistake(train("f", "model.vocab_size=100"), "smaller than")
    mistake(train("g", "train.resume=/nowhere"), "There is no")
    twice = f"data.path={{{demo_shards}: 1, {demo_shards}/../{demo_shards.name}: 1}}"
    mistake(train("g", twice), "names one folder twice")
    copy = shutil.copytree(demo_shards, tmp_path / "copy")
    mistake(train("g", f"data.path={{{demo_shards}: 1, {copy}: 1}}"), "holds the very tokens of")
    mistake(train("g", "name=a/../.."), "leads out of the folder of runs")
    mistake(train("h", f"run_dir={cut}", f"data.path={demo_shards}"), "is a folder of token shards; give the run a folder of its own")
    last = next((tmp_path / "c" / "checkpoints").iterdir())
    mistake(train("i", f"run_dir={last}"), "is a checkpoint; give the run")
    assert not (last / "environment.json").exists() and not (cut / "lock").exists()
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_bad_steps_stop_or_are_skipped_with_a_cap(train: Train, tmp_path: Path) -> None:
    wild = [*QUIET, "optim.lr=1e38", "schedule=constant", "schedule.warmup=0", "train.steps=6", "checkpoint.at_end=false"]
    mistake(train("stop", *wild), "was not taken")
    entry = json.loads((tmp_path / "stop" / "faults.jsonl").read_text().splitlines()[0])
    assert entry["step"] >= 1 and len(entry["sample_ids"]) == 4
    mistake(train("skip", *wild, "faults.policy=skip", "faults.max_skips=2"), "lower optim.lr, or raise faults.max_skips.")
    assert len((tmp_path / "skip" / "faults.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_vetoed_step_leaves_weights_and_moments_alone(stage: int, demo_shards: Path, tmp_path: Path) -> None:
    code = f"""
import torch, sys
from training.config.cli import compose_config, checked
from training.setup import model_config, open_shards
from training.engine import Engine
from training.world import start_distributed
from data.loader import BatchLoader, build_reader
from models.lm import LanguageModel
config = checked(compose_config({[*SMALL, f"data.path={demo_shards}", f"deepspeed=zero{stage}"]!r}))
shards = open_shards(config.data.path, "train"); world = start_distributed("cpu")
model = LanguageModel(model_config(config, shards)[0]); model.init_weights(0)
engine = Engine(model, config, world)
loader = BatchLoader(build_reader(shards, "windows", 32, 0, 4), global_batch=4, micro_batch=2); batches = iter(loader)
engine.step(next(batches), 1e-2)
from training.zero.local_state import local_moments
def state(): return [s.values.clone() for s in local_moments(engine, "exp_avg")] + [p.clone() for p in engine.parameters.values()]
before, weights = state(), {{n: p.clone() for n, p in engine.parameters.items()}}
result = engine.step(next(batches), 1e-2, lambda loss: "because")
assert result.skipped == "because"
assert all(torch.equal(a, b) for a, b in zip(state(), before, strict=True))
assert not engine.step(next(batches), 1e-2).skipped
assert not any(torch.equal(p, weights[n]) for n, p in engine.parameters.items() if p.ndim == 2 and "weight" in n)
loader.close(); engine.close()
"""
    ok(run_program(["-c", code]))


def test_a_full_disk_during_a_save_keeps_the_last_checkpoint(train: Train, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1800k", "tmpfs", str(small)], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        ok(train("x", *QUIET, f"run_dir={small}/run", "train.steps=1"))
        complete = (small / "run" / "checkpoints" / "step-00000001" / "COMPLETE.json").read_text()
        mistake(train("x", *QUIET, f"run_dir={small}/run", "train.steps=3", "checkpoint.every=1"), "free space on the disk")
        assert (small / "run" / "checkpoints" / "step-00000001" / "COMPLETE.json").read_text() == complete
        assert not list((small / "run" / "checkpoints").glob(".tmp*"))
    finally:
        subprocess.run(["umount", str(small)], check=False)
