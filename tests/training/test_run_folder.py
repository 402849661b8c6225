"""A run's folder: which of its checkpoints a path means, while others are written and dropped, and whom the folder belongs to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.files import lock
from tests.conftest import ROOT, environment
from tests.training.savers import Alone, saver_of
from training import checkpoint, setup
from training.config.schema import Config
from training.errors import UserError
from training.world import World


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
