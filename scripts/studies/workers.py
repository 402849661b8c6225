"""Processes that a study starts: they end with the one that started them, and by a moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any


def end_with_parent() -> None:
    """Called in a process that multiprocessing started: once the one that started it is gone, however it ended, this is as if Ctrl-C were pressed.
    Else it would keep its device busy until its own time is up."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def end_by(processes: list[Any], moment: float) -> None:
    """Waits for the processes until then, a second at least, and ends those that still run. moment: of time.time()."""
    for process in processes:
        process.join(max(1.0, moment - time.time()))
        if process.is_alive():
            process.terminate()
