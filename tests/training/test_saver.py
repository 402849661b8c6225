"""Saving beside the steps: what a step waits for, what a failed save leaves, which checkpoints are kept and which are dropped."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models.hub.weights import Weights
from tests.conftest import SMALL, start_program
from tests.training.savers import Alone, saver_of
from training import checkpoint, setup
from training.errors import UserError
from training.saving import saver as saving


def test_a_step_waits_for_the_snapshot_and_for_the_save_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, write = threading.Event(), saving.write_tensors
    monkeypatch.setattr(saving, "write_tensors", lambda *a: (gate.wait(), write(*a))[1])
    saver, said = saver_of(tmp_path)
    with saver:
        saver.save({"step": 1})
        weights = saver.engine.parameters["w"].data
        weights += 100  # training goes on
        assert checkpoint.checkpoints(tmp_path) == [] and saver.news() == [] and saver.saved == 0
        before = time.perf_counter()
        time.sleep(0.3)
        waited = time.perf_counter() - before
        second = threading.Thread(target=saver.save, args=({"step": 2},))
        second.start()
        time.sleep(0.1)
        assert second.is_alive(), "the second save must wait for the first"
        gate.set()
        second.join()
        saver.finish()
        rows = saver.news()
    assert [r["saved_step"] for r in rows] == [1, 2] and saver.saved == 2 and "step waited" in said[0] and "written in" in said[0]
    assert all(0 < r["save_snapshot"] <= r["save_wait"] <= r["save_seconds"] for r in rows)
    assert rows[0]["save_seconds"] > waited, "counted from its own start"
    for step, first in ((1, 0.0), (2, 100.0)):
        assert torch.equal(Weights(checkpoint.folder_of(tmp_path, step)).tensor("w"), torch.arange(5.0) + first)
        assert checkpoint.verify(checkpoint.folder_of(tmp_path, step)) == ""


def test_an_error_of_the_writer_is_the_runs_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _ = saver_of(tmp_path)
    with pytest.raises(UserError, match=r"step 2 could not be written \(rank 0: No space.*run again"), saver:
        saver.save({"step": 1})
        saver.finish()
        monkeypatch.setattr(saving, "write_tensors", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        saver.save({"step": 2})
        saver.finish()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_snapshot_for_which_there_is_no_memory_is_told_where_all_ranks_hear_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _ = saver_of(tmp_path)
    monkeypatch.setattr(saver.memory, "take", lambda tensors: (_ for _ in ()).throw(RuntimeError("can't allocate memory")))
    with pytest.raises(UserError, match=r"step 3 could not be written \(rank 0: can't allocate memory\)"), saver:
        saver.save({"step": 3})
        assert saver.problem, "the loop asks for it with the other ranks"
        saver.finish()
    assert checkpoint.checkpoints(tmp_path) == []


def test_an_old_one_that_cannot_be_dropped_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, said = saver_of(tmp_path)
    monkeypatch.setattr(saver, "_drop_old", lambda: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    with saver:
        for step in (1, 2):
            saver.save({"step": step})
            saver.finish()
            assert saver.saved == step and checkpoint.verify(checkpoint.folder_of(tmp_path, step)) == ""
    assert sum("could not be dropped (Permission denied)" in line for line in said) == 2


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(run)]


def test_who_goes_back_to_an_older_checkpoint_keeps_the_newer_work(tmp_path: Path) -> None:
    first, _ = saver_of(tmp_path, keep=9, background=False)
    with first:
        for step in (1, 2, 6, 7):
            first.save({"step": step})
    branch, _ = saver_of(tmp_path, start=2, keep=2, background=False)
    with branch:
        branch.save({"step": 4})
        assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 4) == checkpoint.newest_together(tmp_path, Alone())
        assert steps(tmp_path) == [7, 4]
        branch.save({"step": 7})  # takes the place of the other branch's
        assert steps(tmp_path) == [4, 7] and checkpoint.read_state(checkpoint.folder_of(tmp_path, 7))["step"] == 7
        branch.save({"step": 8})
    assert steps(tmp_path) == [7, 8] and not list((tmp_path / "checkpoints").glob(".*"))
    older, newest = (checkpoint.folder_of(tmp_path, step) for step in (7, 8))
    assert setup._branches(tmp_path, newest, False) == "" and f"newer than {newest.name}" in setup._branches(tmp_path, older, True)
    with saver_of(tmp_path, start=7, keep=2, background=False)[0] as back:
        back.save({"step": 7})
    told = setup._branches(tmp_path, older, False)
    assert f"the one saved last; {newest.name} is of a branch that was left" in told and f"train.resume={newest}" in told


def test_a_damaged_checkpoint_does_not_push_out_what_comes_after_it(tmp_path: Path) -> None:
    first, _ = saver_of(tmp_path, keep=2, background=False)
    with first:
        first.save({"step": 2})
        first.save({"step": 4})
    (checkpoint.folder_of(tmp_path, 4) / "model.safetensors").write_bytes(b"")
    said: list[str] = []
    assert checkpoint.newest(tmp_path, said.append) == checkpoint.folder_of(tmp_path, 2) and "missing or cut short" in said[0]
    again, _ = saver_of(tmp_path, start=2, keep=1, background=False)
    with again:
        again.save({"step": 3})
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 3)


def tear(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-3])


def alter(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


@pytest.mark.parametrize(("damage", "again", "keep"), [(tear, False, 2), (alter, True, 2), (alter, False, 3), (tear, True, 1)])
def test_only_whole_checkpoints_take_a_place(tmp_path: Path, damage: Any, again: bool, keep: int) -> None:
    """again: damaged before the run goes on, by another process than the one that wrote it; else under the hands of the one that did."""
    saver, said = saver_of(tmp_path, keep=9, background=False)
    for step in range(1, 6):
        saver.save({"step": step})
    for step in (3, 5):
        damage(checkpoint.folder_of(tmp_path, step))
    saver.settings.keep = keep
    if again:
        saver.__exit__(None)
        saver, said = saver_of(tmp_path, start=4, keep=keep, background=False, begun=checkpoint.folder_of(tmp_path, 4))
    with saver:
        saver.save({"step": 6})
        assert steps(tmp_path) == {1: [6], 2: [4, 5, 6], 3: [2, 3, 4, 5, 6]}[keep]
        assert sum("takes none of the places of checkpoint.keep" in line for line in said) == {1: 0, 2: 1, 3: 2}[keep]
        for step in range(7, 7 + keep):
            saver.save({"step": step})
    assert steps(tmp_path) == list(range(7, 7 + keep)), "damaged ones go with those that are older"


def test_old_ones_go_milestones_stay_and_what_a_dead_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step-00000009-abc").mkdir(parents=True)
    saver, _ = saver_of(tmp_path, keep=2, milestones=[2], background=False)
    with saver:
        for step in (1, 2, 3, 4, 4, 5):
            saver.save({"step": step})
            assert saver.saved == step
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (2, 4, 5)]


def test_sigterm_in_the_middle_of_a_save_waits_for_it(demo_shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code = "import time, training.saving.saver as s; w = s.write_tensors; s.write_tensors = lambda *a: (time.sleep(0.7), w(*a))[1]; import sys, train; sys.exit(train._entry())"
    words = [*SMALL, f"data.path={demo_shards}", f"run_dir={run}", "eval=end", "train.steps=100000", "checkpoint.every=1"]
    process = start_program(["-c", code, *words])
    while not list(run.glob("checkpoints/.tmp-*")):
        assert process.runs()
        time.sleep(0.01)
    process.kill(signal.SIGTERM)
    done = process.wait()
    out = done.stdout
    assert done.returncode == 75 and "stopped by SIGTERM" in out, out
    complete = checkpoint.checkpoints(run)
    assert complete and all(checkpoint.verify(folder) == "" for folder in complete) and not list(run.glob("checkpoints/.tmp-*"))
    assert f"after step {checkpoint.step_of(complete[-1])};" in out
