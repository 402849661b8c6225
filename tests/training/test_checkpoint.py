"""Checkpoints by themselves: cut over ranks and put together again at any stage, written in the background, verified, dropped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.files import lock
from models.hub.weights import Weights, write_tensors
from tests.conftest import ROOT, SMALL, environment, run_ranks, start_program
from tests.training.savers import Alone, saver_of
from training import checkpoint, setup
from training.config.schema import Config
from training.errors import UserError
from training.saving import saver as saving
from training.world import World
from training.zero.local_state import Stretch, share


def work(what: str, ranks: int, shards: Path, folder: Path) -> dict[str, Any]:
    done = run_ranks(ranks, ["-m", "tests.training.reshape", what, str(shards), str(folder)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / f"{what}{ranks}.json").read_text())


@pytest.mark.slow
def test_four_ranks_write_what_two_and_one_read_at_every_stage(demo_shards: Path, tmp_path: Path) -> None:
    saved = work("save", 4, demo_shards, tmp_path)
    assert saved["zero0"]["uneven"] > 0, "no parameter is split unequally"
    for stage in range(4):
        folder, exact = checkpoint.folder_of(tmp_path / f"zero{stage}", 2), load_file(tmp_path / f"whole{stage}.safetensors")
        read = {**{n: Weights(folder).tensor(n) for n in Weights(folder).names()}}
        read |= {n: Weights(folder, "optimizer").tensor(n) for n in Weights(folder, "optimizer").names()}
        assert read.keys() == exact.keys() and all(torch.equal(read[n], exact[n]) for n in exact), stage
        sizes = [p.stat().st_size for p in sorted(folder.glob("optimizer-*.safetensors"))]
        assert len(sizes) == 4 and max(sizes) < 1.3 * min(sizes)
    for ranks in (2, 1):
        loaded = work("load", ranks, demo_shards, tmp_path)
        assert len(loaded) == (16 if ranks == 2 else 4)
        for pair, row in loaded.items():
            assert row["differ"] == [] and row["steps"] == 3, (ranks, pair, row)
            assert row["loss"] == pytest.approx(saved[f"zero{pair[0]}"]["loss"], rel=1e-6), (ranks, pair)


@pytest.mark.slow
def test_a_nan_gradient_on_one_rank_is_left_out_by_all(demo_shards: Path, tmp_path: Path) -> None:
    for stage, row in work("nan", 2, demo_shards, tmp_path).items():
        assert row["skipped"] == ["gradient norm is not finite"] * 2 and row["same"] and row["steps"] == 1, (stage, row)
        assert row["loss"] == row["vetoed"], (stage, row)


def test_shares_cover_everything_once() -> None:
    tensors = {f"p{n}": torch.arange(n) + 1000 * n for n in (5, 1, 17, 0, 2)}
    for size in (1, 2, 3, 4, 30):
        parts = [share([Stretch(name, 0, values) for name, values in tensors.items()], rank, size) for rank in range(size)]
        counts = [sum(s.values.numel() for s in part) for part in parts]
        assert sum(counts) == 25 and max(counts) - min(counts) <= 1
        for name, values in tensors.items():
            cuts = sorted((s for part in parts for s in part if s.name == name), key=lambda s: s.first)
            assert torch.equal(torch.cat([values[:0], *(s.values for s in cuts)]), values)
            assert [s.first for s in cuts] == [0, *(s.end for s in cuts)][: len(cuts)]


def test_the_file_is_what_the_library_reads_and_its_hash_is_true(tmp_path: Path) -> None:
    tensors = {
        "a.b": torch.randn(3, 4, 1),
        "empty": torch.empty(0),
        "scalar": torch.tensor(2.0),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    entry = write_tensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], t) and read[n].shape == t.shape for n, t in tensors.items())
    assert entry == {"bytes": (tmp_path / "x.safetensors").stat().st_size, "sha256": checkpoint.digest(tmp_path / "x.safetensors")}
    assert write_tensors(tmp_path / "y.safetensors", {})["bytes"] > 0 and load_file(tmp_path / "y.safetensors") == {}
    stop = threading.Event()
    stop.set()
    with pytest.raises(OSError, match="given up"):
        write_tensors(tmp_path / "z.safetensors", tensors, stop)


def cut_in_two(folder: Path, parts: Any = None) -> torch.Tensor:
    whole = torch.randn(5, 3)
    for i, part in enumerate((whole.view(-1)[:7], whole.view(-1)[7:])):
        save_file({"w": part.clone()}, folder / f"model-{i}.safetensors")
    table = {"w": {"shape": [5, 3], "parts": parts or [["model-1.safetensors", 7, 15], ["model-0.safetensors", 0, 7]]}}
    (folder / "model.index.json").write_text(json.dumps({"tensors": table}))
    return whole


def test_stretches_are_read_across_files(tmp_path: Path) -> None:
    whole = cut_in_two(tmp_path)
    weights = Weights(tmp_path)
    assert weights.names() == ["w"] and weights.shape("w") == (5, 3) and torch.equal(weights.tensor("w"), whole)
    for first in range(15):
        for end in range(first, 16):
            assert torch.equal(weights.stretch("w", first, end), whole.view(-1)[first:end])


def test_export_and_loading_read_what_several_ranks_wrote(tmp_path: Path) -> None:
    from models.hub.export import write_folder
    from tests.hub.test_native_export import FAMILIES
    from tests.hub.test_native_export import checkpoint as made

    whole, cut = made(tmp_path / "whole", FAMILIES["llama"]), tmp_path / "cut"
    cut.mkdir()
    tensors, table = (
        load_file(whole / "model.safetensors"),
        {n: {"shape": list(t.shape), "parts": []} for n, t in load_file(whole / "model.safetensors").items()},
    )
    for rank in range(3):
        part = share([Stretch(n, 0, t.view(-1)) for n, t in tensors.items()], rank, 3)
        write_tensors(cut / f"model-{rank}.safetensors", {s.name: s.values for s in part})
        for s in part:
            table[s.name]["parts"].append([f"model-{rank}.safetensors", s.first, s.end])
    (cut / "model.index.json").write_text(json.dumps({"tensors": table}))
    for name in ("config.json", "tokenizer.json"):
        (cut / name).write_bytes((whole / name).read_bytes())
    for source in (whole, cut):
        (tmp_path / f"out-{source.name}").mkdir()
        write_folder(source, tmp_path / f"out-{source.name}", "bf16", 1 << 40, "apache-2.0")
    assert (tmp_path / "out-whole" / "model.safetensors").read_bytes() == (tmp_path / "out-cut" / "model.safetensors").read_bytes()
    a, b = (checkpoint.load_model(folder)[0].state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "parts",
    [
        [["model-0.safetensors", 0, 7]],
        [["model-0.safetensors", 0, 7], ["model-1.safetensors", 6, 15]],
        [["model-0.safetensors", 0, 7], ["../model-1.safetensors", 7, 15]],
        [["model-0.safetensors", 0]],
        "parts",
    ],
)
def test_an_index_with_gaps_or_ways_out_is_refused(tmp_path: Path, parts: Any) -> None:
    cut_in_two(tmp_path, parts)
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        Weights(tmp_path)


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


def test_a_run_that_drops_checkpoints_is_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, _ = saver_of(tmp_path, keep=1, background=False)
    verify, warned = checkpoint.verify, list[str]()
    with saver:
        saver.save({"step": 1})

        def meanwhile(folder: Path, *arguments: Any, **more: Any) -> str:
            if saver.saved < 3:
                saver.save({"step": saver.saved + 1})
            return verify(folder, *arguments, **more)

        monkeypatch.setattr("models.checkpoint.verify", meanwhile)
        assert checkpoint.newest(tmp_path, warned.append) == checkpoint.folder_of(tmp_path, 3) and warned == []
        monkeypatch.setattr("models.checkpoint.verify", verify)
        (checkpoint.folder_of(tmp_path, 3) / "state.json").unlink()
        with pytest.raises(UserError, match="no complete checkpoint"):
            checkpoint.find(tmp_path)
        saver.save({"step": 4})

        def read(folder: Path) -> int:
            if saver.saved < 6:
                saver.save({"step": saver.saved + 1})
            return int(checkpoint.read_state(folder)["step"])

        assert checkpoint.find_and_read(tmp_path, read) == 6

        def outrun(folder: Path) -> Any:
            saver.save({"step": saver.saved + 1})
            return checkpoint.read_state(folder)

        with pytest.raises(UserError, match="drops its checkpoints before they can be read"):
            checkpoint.find_and_read(tmp_path, outrun)
        with pytest.raises(FileNotFoundError):
            checkpoint.find_and_read(tmp_path, lambda folder: (folder / "nothing").read_text())


def test_what_lies_beside_a_checkpoint_is_told_from_it(tmp_path: Path) -> None:
    with saver_of(tmp_path)[0] as saver:
        saver.save({"step": 1})
    folder = checkpoint.folder_of(tmp_path, 1)
    for path, words in ((folder / checkpoint.MARKER, "is a file; give the folder"), (folder.parent, f"give the run folder {tmp_path}, or")):
        with pytest.raises(UserError, match=words):
            checkpoint.find(path)
    assert checkpoint.find(tmp_path) == folder


def test_a_run_folder_belongs_to_one_process_until_it_ends(tmp_path: Path) -> None:
    code = "import pathlib, sys, time; from data.files import lock; held = lock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"belongs to process {other.pid} of .*; stop it, or give another run_dir"):
        lock(tmp_path, here=0.0)
    threading.Timer(0.3, other.kill).start()
    locked = lock(tmp_path)
    assert (tmp_path / "lock").read_text().split()[1] == str(os.getpid())
    other.wait()
    with pytest.raises(UserError, match=f"belongs to process {os.getpid()}"):
        lock(tmp_path, here=0.0)
    locked.close()
    lock(tmp_path, here=0.0).close()


def test_a_lock_that_was_removed_under_who_waits_for_it_is_nobodys(tmp_path: Path) -> None:
    """A start that is refused takes its new folder back, lock and all, while another waits."""
    first, had = lock(tmp_path), list[Any]()
    waiting = threading.Thread(target=lambda: had.append(lock(tmp_path)))
    waiting.start()
    time.sleep(0.1)
    (tmp_path / "lock").unlink()
    tmp_path.rmdir()
    first.close()
    waiting.join()
    with pytest.raises(UserError, match=f"belongs to process {os.getpid()}"):
        lock(tmp_path, here=0.0)
    had[0].close()


def test_rank_0_says_what_train_resume_means(tmp_path: Path) -> None:
    class Second(World):
        """Rank 1, to whom rank 0 says `first`, and the step it has found."""

        def __init__(self, first: str, step: float = -1.0) -> None:
            self.rank, self.size, self.device, self.first, self.step = 1, 2, torch.device("cpu"), first, step

        def texts(self, own: str) -> list[str]:
            return [self.first, own]

        def sum(self, values: list[float]) -> list[float]:
            step, self.step = self.step, -1.0
            return [step]

        def any(self, flag: bool) -> bool:
            return flag

    saver, _ = saver_of(tmp_path / "run", keep=9)
    with saver:
        for step in (1, 2):
            saver.save({"step": step})
    config = Config(run_dir=str(tmp_path / "other"))
    config.train.resume = str(tmp_path / "run")
    assert setup._checkpoint_of(config, Second("run", 1.0)) == checkpoint.folder_of(tmp_path / "run", 1), (
        "rank 0 does not see the second yet"
    )
    with pytest.raises(UserError, match="There is no"):
        setup._checkpoint_of(config, Second("nothing"))
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        setup._checkpoint_of(config, Second("run"))
    assert setup._checkpoint_of(config, Alone()) == checkpoint.folder_of(tmp_path / "run", 2)


def test_old_ones_go_milestones_stay_and_what_a_dead_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step-00000009-abc").mkdir(parents=True)
    saver, _ = saver_of(tmp_path, keep=2, milestones=[2], background=False)
    with saver:
        for step in (1, 2, 3, 4, 4, 5):
            saver.save({"step": step})
            assert saver.saved == step
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (2, 4, 5)]


def test_checkpoints_of_the_first_format_are_read_and_later_ones_refused(tmp_path: Path) -> None:
    saver, _ = saver_of(tmp_path)
    with saver:
        saver.save({"step": 1})
    folder = checkpoint.folder_of(tmp_path, 1)
    marker = json.loads((folder / "COMPLETE.json").read_text())
    for number, words in ((1, ""), (3, "is of format 3, this program reads 1 and 2")):
        (folder / "COMPLETE.json").write_text(json.dumps({**marker, "format": number}))
        assert (words in checkpoint.verify(folder)) if words else checkpoint.verify(folder) == ""


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
