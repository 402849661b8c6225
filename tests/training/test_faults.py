"""Faults put into runs of two ranks: each ends as it should, and the run that goes on from there equals the one nothing happened to, bit for bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.files import write_bytes
from data.loader import BatchLoader
from tests.conftest import ROOT, SMALL, environment, run_program, run_ranks
from tests.training.test_runs import launcher, losses
from training.config.schema import Config, DataSection, FaultSection
from training.errors import UserError
from training.guard import agreement
from training.guard.faults import BadStepPolicy
from training.result import StepResult
from training.setup import open_reader, open_shards
from training.watch.metrics import Metrics
from training.world import World

WORDS = [
    *SMALL,
    "eval=end",
    "eval.tokens=256",
    "eval.sample_tokens=1",
    "train.micro_batch=2",
    "train.steps=8",
    "checkpoint.every=2",
    "checkpoint.keep=9",
]


def start(run: Path, data: Path, inject: str = "", *words: str, **extra: Any) -> subprocess.CompletedProcess[str]:
    return run_ranks(2, ["-m", "tests.training.inject", *WORDS, f"data.path={data}", f"run_dir={run}", *words], INJECT=inject, **extra)


@pytest.fixture(scope="module")
def whole(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = start(run, demo_shards)
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(run)


def kept(run: Path) -> list[str]:
    return sorted(p.parent.name[-1] for p in (run / "checkpoints").glob("step-*/COMPLETE.json"))


def refused(done: subprocess.CompletedProcess[str], words: str) -> None:
    """Ended with our sentence, said once, and no traceback of ours (the launcher shows its own)."""
    assert done.returncode != 0 and done.stderr.count(words) == 1, done.stdout + done.stderr[-3000:]
    assert "training/saving/saver.py" not in done.stderr and 'train.py", line' not in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_goes_through_faults_of_saves_data_and_clocks(whole: dict[int, float], demo_shards: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(demo_shards, data)
    refused(start(run, data, "seed 1 0"), "Rank 1 (")
    assert not run.exists()

    # a rank dies in the middle of its part of a save: the half is no checkpoint
    assert start(run, data, "kill 1 4").returncode != 0
    assert kept(run) == ["2"] and list((run / "checkpoints").glob(".tmp-*"))

    # one rank's disk is full: both end, nothing half-written stays
    done = start(run, data, "full 1 4")
    assert "step-00000002 at step 2" in done.stdout
    refused(done, "could not be written (rank 1: No space left on device); free space on the disk")
    assert kept(run) == ["2"] and not list((run / "checkpoints").glob(".tmp-*"))

    # token shards are cut while they are read: the steps taken are saved
    done = start(run, data, "cut 0 3", "data.prefetch=1")
    refused(done, "was changed during the run")
    reached = max(int(k) for k in kept(run))
    assert 5 <= reached < 8, done.stdout
    shutil.copyfile(demo_shards / "train-00000.bin", data / "train-00000.bin")

    # a bit of the newest checkpoint flips: the one before it is used, and one rank's clock and random states do not matter
    shard = run / "checkpoints" / f"step-{reached:08d}" / "optimizer-00002-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    before = max(int(k) for k in kept(run) if int(k) < reached)
    done = start(run, data, "clock 1 0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{shard} does not have the content it was saved with" in done.stdout and f"step-{before:08d} at step {before}" in done.stdout
    assert losses(run) == whole
    assert "8" in kept(run)


@pytest.mark.slow
def test_a_hung_rank_of_a_run_is_found_and_the_run_finishes(whole: dict[int, float], demo_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    supervisor = [sys.executable, "-m", "training.supervisor", "restarts=1", "timeout=10", "startup=240", "backoff=0", "--", sys.executable]
    done = subprocess.run(
        [*supervisor, *launcher("torchrun"), "-m", "tests.training.inject", *WORDS, f"data.path={demo_shards}", f"run_dir={run}"],
        cwd=ROOT,
        env=environment(INJECT="hang 1 6", INJECT_ONCE=str(tmp_path / "once")),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "no rank took a step" in done.stderr and (tmp_path / "once").exists()
    stacks = {p.name: p.read_text() for p in (run / "supervisor").glob("attempt-1-rank-*.stacks")}
    assert len(stacks) == 2 and "in hang" in stacks["attempt-1-rank-00001.stacks"]
    assert "engine.py" in stacks["attempt-1-rank-00000.stacks"], "the other rank waits in its step"
    assert losses(run) == whole


class Ranks(World):
    """A world whose other ranks say what they are given."""

    def __init__(self, *others: dict[str, Any]) -> None:
        self.rank, self.size, self.others = 0, 1 + len(others), others

    def texts(self, own: str) -> list[str]:
        return [own, *(json.dumps({**json.loads(own), **other}) for other in self.others)]


def test_a_resumed_run_judges_steps_by_those_before_it(tmp_path: Path) -> None:
    draw, faults = np.random.default_rng(0), FaultSection("skip", 10**6, 1.05, 16)
    whole = BadStepPolicy(faults, None)
    half: BadStepPolicy | None = None
    verdicts: list[tuple[str, str]] = []
    for step in range(200):
        if step % 20 == 10:
            half = BadStepPolicy(faults, None)
            half.load(json.loads(json.dumps(whole.state())))
        loss = float(draw.normal(5.0, 0.2))
        why = whole.judge(loss)
        for policy in (whole, half):
            if policy is not None:
                verdicts.append((policy.judge(loss), why))
                policy.record(step, StepResult(loss, 1.0, 8, why, 1.0), [])
    assert all(a == b for a, b in verdicts) and half is not None and half.skips == whole.skips > 20


def test_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model={"mixers": {"a": {"n": 1}}})
    facts = agreement.facts(config, ["f"])
    agreement.agree(Ranks({"host": "b"}), config, ["f"])
    for key, value, words in [
        ("setting train.seq_len", "512", r"Rank 2 \(b\) differs from rank 0 .* in setting train.seq_len: 512 there, 256 here; start every"),
        ("setting model.mixers.a.n", "2", "setting model.mixers.a.n: 2 there, 1 here"),
        ("code hash", "x", "in code hash: x there, .* same checkout"),
        ("library torch", "1.0", "in library torch: 1.0 there, .* same environment"),
        ("data fingerprint 0", "g", "in data fingerprint 0: g there, f here"),
    ]:
        with pytest.raises(UserError, match=words):
            agreement.agree(Ranks({}, {"host": "b", "facts": {**facts, key: value}}), config, ["f"])
    with pytest.raises(UserError, match="and 1 more: 1 there, 0 here"):
        agreement.agree(Ranks({"facts": {**facts, "setting seed": "1", "setting train.steps": "9"}}), config, ["f"])
    with pytest.raises(UserError, match=r"^Rank 1 \(c\): no data$"):
        agreement.agree(Ranks({"host": "c", "problem": "no data"}), config, ["f"])


def test_code_counts_as_it_lies_there(tmp_path: Path) -> None:
    for name in agreement.CODE:
        (tmp_path / name).write_text("1") if name.endswith(".py") else (tmp_path / name).mkdir()
    before = agreement.code_hash(tmp_path)
    (tmp_path / "models" / "x.py").write_text("2")
    assert before != agreement.code_hash(tmp_path) == agreement.code_hash(tmp_path)


@pytest.mark.slow
def test_an_unreachable_wandb_costs_a_warning(demo_shards: Path, tmp_path: Path) -> None:
    words = [
        *SMALL,
        f"data.path={demo_shards}",
        f"run_dir={tmp_path / 'run'}",
        "eval=end",
        "eval.tokens=256",
        "train.steps=2",
        "logging.wandb=online",
    ]
    away: dict[str, Any] = {"WANDB_MODE": "", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_INIT_TIMEOUT": "3"}
    done = run_program(["train.py", *words], **away)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("wandb is not available") == 1 and "`wandb sync` uploads later" in done.stdout
    assert len(losses(tmp_path / "run")) == 2 and list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_wandb_that_fails_in_the_middle_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("connection lost")

    metrics = Metrics(tmp_path, Config(), torch.device("cpu"), 1, 1, True)
    metrics.open(0, None)
    metrics.wandb = Failing()
    for step in (1, 2):
        metrics.step(step, StepResult(1.0, 1.0, 1, "", 1.0), 1.0, 0.0)
    metrics.close()
    assert capsys.readouterr().out.count("connection lost") == 1
    assert losses(tmp_path) == {1: 1.0, 2: 1.0}


def test_a_disk_that_is_full_for_metrics_does_not_end_rank_0_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, Config(), torch.device("cpu"), 2, 1, True)
    metrics.open(0, None)
    metrics.file = open("/dev/full", "w", buffering=1)
    for step in (1, 2):
        metrics.step(step, StepResult(1.0, 1.0, 1, "", 1.0), 1.0, 0.0)
    metrics.close()
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written (No space left on device)") == 1
    policy = BadStepPolicy(FaultSection(policy="skip"), Path("/dev/full"))
    policy.record(1, StepResult(1.0, float("nan"), 1, "gradient norm is not finite", 1.0), [1])
    assert policy.skips == 1


def test_a_result_that_the_disk_does_not_take_ends_the_run_in_a_sentence(demo_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import errno, sys, train, evals.in_loop as e\n"
        "def full(path, value): raise OSError(errno.ENOSPC, 'No space left on device', str(path))\n"
        "e.write_json = full; sys.exit(train._entry())"
    )
    words = [*WORDS, "train.micro_batch=4", f"data.path={demo_shards}", f"run_dir={run}"]
    done = run_program(["-c", code, *words])
    told = f"error: {run / 'eval.json'} cannot be written: No space left on device; free space there and start again.\n"
    assert done.returncode == 2 and done.stderr == told and "held out after step 8" in done.stdout, done.stdout + done.stderr
    assert kept(run) == ["2", "4", "6", "8"]
    again = run_program(["train.py", *words])
    assert again.returncode == 0 and json.loads((run / "eval.json").read_text())["step"] == 8, again.stderr


def test_a_file_of_which_half_was_written_does_not_stay(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk."""
    write_bytes(tmp_path / "a", b"before")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(tmp_path / "a", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"before"


def test_shards_that_are_cut_under_a_reader_are_named(demo_shards: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_shards, data)
    with BatchLoader(
        open_reader(Config(data=DataSection(path=str(data))), open_shards(str(data), "train")), global_batch=4, micro_batch=4, prefetch=1
    ) as loader:
        assert loader.fetch()[1] == ""
        path = data / "train-00000.bin"
        os.truncate(path, 1000)
        fetched = [loader.fetch() for _ in range(4)]
    assert fetched[-1][0] == [] and str(path) in fetched[-1][1] and "was changed during the run and has 1,000 bytes now" in fetched[-1][1]


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_shard_that_is_cut_between_a_look_and_the_read_does_not_kill(ending: str, demo_shards: Path, tmp_path: Path) -> None:
    """Whatever moment it is: a map of the file would end the process with SIGBUS, and the launcher the other ranks."""
    shutil.copytree(demo_shards, tmp_path / "data")
    code = """
import os, sys
import numpy as np
from data.shards import ShardSet
folder, cut, real = sys.argv[1], sys.argv[1] + "/train-00000" + sys.argv[2], os.stat
shards = ShardSet(folder, "train")
def stat(path, *rest, **more):  # what was looked at is gone by the time it is read
    found = real(path, *rest, **more)
    os.truncate(cut, 10)
    return found
os.stat = stat
if cut.endswith(".idx"):
    os.truncate(cut, 10)
for _ in range(2):
    try:
        shards.rows(np.array([shards.n_tokens - 500]), 257)
        os.truncate(cut, 10)
    except ValueError as error:
        print(error)
"""
    done = run_program(["-c", code, str(tmp_path / "data"), ending])
    assert done.returncode == 0 and "was changed during the run and has 10 bytes now" in done.stdout, (done.returncode, done.stderr)


def test_more_files_than_a_process_may_hold_are_read(demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data import parts
    from data.shards import ShardSet

    before = ShardSet(demo_shards, "train")
    monkeypatch.setattr(parts, "OPEN_FILES", 1)
    after, rows = ShardSet(demo_shards, "train"), np.arange(0, before.n_tokens - 65, 997)
    for ours, theirs in zip(after.rows(rows, 65), before.rows(rows, 65)):
        np.testing.assert_array_equal(ours, theirs)
    assert after.files.open.cache_info().currsize == 1
