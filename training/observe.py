"""How the ranks of a run are doing: signs of life and stacks for the supervisor, agreement at the start."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from pathlib import Path

FOLDER = "EVERYWHEN_RANKS"  # set by training/supervisor.py
BEAT_SECONDS = 0.5  # a file a rank is written at most this often


class SignOfLife:
    """rank-XXXXX.json of this rank (host, process id, last step, last saved step), and its stacks on SIGUSR2.

    The handler is faulthandler's: it writes from the signal itself, so a rank that hangs inside a collective still answers:
    `kill -USR2 PID` and read rank-XXXXX.stacks.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        folder = Path(os.environ.get(FOLDER) or run_dir / "ranks")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:05d}.json"
        self.row: dict[str, object] = {"host": socket.gethostname(), "pid": os.getpid(), "step": None, "saved": None}
        self.last = 0.0
        self.stacks = self.path.with_suffix(".stacks").open("w")
        faulthandler.register(signal.SIGUSR2, self.stacks, all_threads=True)
        self._write()

    def beat(self, step: int, saved: int) -> None:
        """Says that this rank has finished `step` and that the newest checkpoint is of step `saved`."""
        new = saved != self.row["saved"] or self.row["step"] is None
        self.row |= {"step": step, "saved": saved}
        if new or time.monotonic() - self.last > BEAT_SECONDS:
            self._write()

    def _write(self) -> None:
        self.last = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self.row))
            os.replace(temporary, self.path)
        except OSError:
            pass  # a full disk must not end a run here; a save says so in its own words

    def close(self) -> None:
        faulthandler.unregister(signal.SIGUSR2)
        self.stacks.close()
