"""The hook of a run, a command that gets each checkpoint: it never ends a run, and is itself ended at its limit."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.training.savers import saver_of
from training import checkpoint
from training.saving.hook import Hook


def test_the_hook_gets_each_checkpoint_and_never_ends_a_run(tmp_path: Path) -> None:
    out = tmp_path / "up load"
    out.mkdir()
    saver, said = saver_of(tmp_path / "it's", keep=1, hook=f"cp -r {{folder}} '{out}' && sleep 0.2 && false")
    with saver:
        saver.save({"step": 1})
        saver.finish()
        time.sleep(0.1)
        saver.save({"step": 2})
    assert sorted(p.name for p in out.iterdir()) == ["step-00000001", "step-00000002"], "one was dropped before it was copied"
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "it's")] == ["step-00000002"]
    assert sum("status 1" in line and "hook.log" in line for line in said) == 2
    assert (tmp_path / "it's" / "hook.log").read_text().count("status 1") == 2


def test_a_hook_is_ended_at_the_limit_and_overtaken_checkpoints_are_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    others = children()
    hook = Hook("echo {folder}; exec sleep 300", tmp_path / "hook.log", said.append)
    hook.add(tmp_path / "a")
    while hook.process is None:
        time.sleep(0.01)
    hook.add(tmp_path / "b")
    hook.add(tmp_path / "c")
    assert hook.needs(tmp_path / "a") and not hook.needs(tmp_path / "b") and hook.needs(tmp_path / "c")
    hook.close(0.1)
    assert "skipped for b" in said[0] and any("did not finish in 0.1 s for a, c" in line for line in said)
    assert children() == others


def children() -> list[int]:
    """Children of this process, zombies included."""
    return [child.pid for child in psutil.Process().children()]


def test_a_hook_that_was_about_to_start_at_the_limit_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, reached = threading.Event(), threading.Event()

    def quote(text: str) -> str:
        reached.set()
        gate.wait()
        return text

    monkeypatch.setattr("training.saving.hook.shlex.quote", quote)
    hook = Hook("exec sleep 300 {folder}", tmp_path / "hook.log", lambda text: None)
    hook.add(tmp_path / "a")
    reached.wait()
    closing = threading.Thread(target=hook.close, args=(0.0,), daemon=True)
    closing.start()
    time.sleep(0.1)
    gate.set()
    closing.join(20)
    assert not closing.is_alive() and hook.process is None


def test_a_hook_that_cannot_be_started_gives_the_next_checkpoint_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    popen, broken = subprocess.Popen, [True]
    monkeypatch.setattr(
        "training.saving.hook.subprocess.Popen", lambda *a, **k: (_ for _ in ()).throw(ValueError("odd name")) if broken else popen(*a, **k)
    )
    hook = Hook("touch {folder}-done", tmp_path / "hook.log", said.append)
    hook.add(tmp_path / "a")
    while not said and hook.thread.is_alive():
        time.sleep(0.01)
    broken.clear()
    hook.add(tmp_path / "b")
    signs: list[int] = []
    hook.close(30, lambda: signs.append(1))
    assert "could not run for a (odd name)" in said[0] and (tmp_path / "b-done").exists() and signs


def test_a_checkpoint_whose_hook_was_cut_short_is_handed_on_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut, said = saver_of(tmp_path / "run", hook=f"echo {{folder}} >> {out}; sleep 300", hook_minutes=0.001)
    with cut:
        cut.save({"step": 1})
    assert any("did not finish" in line for line in said)
    for _ in range(3):
        again, said = saver_of(tmp_path / "run", hook=f"echo {{folder}} >> {out}", start=1)
        with again:
            again.finish()
        assert said == []
    assert len(out.read_text().splitlines()) == 2, "once cut short, once whole"
