"""train.py with a fault put in: python -m tests.training.inject ARGUMENTS, with INJECT="FAULT RANK STEP" in the environment.

kill: SIGKILL in the middle of writing the checkpoint of STEP; full: its disk has no room; hang: sleeps in STEP, once (the file INJECT_ONCE
is made then); cut: the first token shard is truncated in STEP; seed, code: another seed, other code than the other ranks; clock: a day
ahead, with random states of its own.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def at_step(step: int, act: Any) -> None:
    """Calls `act` before optimizer step number `step` (from 1) since the start of this process's engine."""
    from training.engine import Engine

    original, count = Engine.step, [0]

    def stepped(self: Any, *arguments: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == step:
            act()
        return original(self, *arguments, **more)

    Engine.step = stepped  # type: ignore[method-assign]


def in_save(step: int, act: Any) -> None:
    """Calls `act(path)` before this rank writes its optimizer file of the checkpoint of `step`."""
    from training.saving import saver as saving

    original = saving.write_tensors

    def written(path: Path, tensors: Any, cancel: Any = None) -> Any:
        if f"step-{step:08d}" in path.parent.name and path.name.startswith("optimizer"):
            act(path)
        return original(path, tensors, cancel)

    saving.write_tensors = written


def kill(path: Path) -> None:
    path.write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def hang() -> None:
    once = Path(os.environ["INJECT_ONCE"])
    if not once.exists():
        once.touch()
        time.sleep(3600)


def cut() -> None:
    folder = next(a.partition("=")[2] for a in sys.argv if a.startswith("data.path="))
    os.truncate(Path(folder, "train-00000.bin"), 1000)


def clock() -> None:
    true = time.time
    time.time = lambda: true() + 86400
    random.seed(12345)
    np.random.seed(12345)


def main() -> int:
    fault, rank, step = (os.environ.get("INJECT") or "none 0 0").split()
    if os.environ.get("RANK", "0") == rank:
        if fault == "seed":
            sys.argv.append("seed=7")
        elif fault == "code":
            from training.guard import agreement

            agreement.code_hash = lambda *_: "another"
        elif fault == "clock":
            clock()
        elif fault in ("kill", "full"):
            in_save(int(step), {"kill": kill, "full": full}[fault])
        elif fault in ("hang", "cut"):
            at_step(int(step), {"hang": hang, "cut": cut}[fault])
    import train

    return train._entry()


if __name__ == "__main__":
    from training.launch import leave

    leave(main)
