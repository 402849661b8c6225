"""checkpoint.hook: a user's command for every complete checkpoint, in the background, such as an upload. It never ends a run."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Hook:
    """Runs `command` through the shell with {folder} replaced, one checkpoint after the other; its output goes to `log`.

    A command slower than the checkpoints come skips those that were overtaken. What it works on is not dropped: see `needs`.
    """

    def __init__(self, command: str, log: Path, say: Callable[[str], Any]) -> None:
        self.command, self.log, self.say = command, log, say
        self.lock = threading.Condition()
        self.running: Path | None = None
        self.waiting: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="hook", daemon=True)
        self.thread.start()

    def add(self, folder: Path) -> None:
        """Has the command run for `folder` as soon as it is free."""
        with self.lock:
            if self.waiting is not None:
                self.say(f"checkpoint.hook is slower than checkpoints come: skipped for {self.waiting.name}.")
            self.waiting = folder
            self.lock.notify_all()

    def needs(self, folder: Path) -> bool:
        """Whether the command works on `folder` or is about to."""
        with self.lock:
            return folder in (self.running, self.waiting)

    def close(self, seconds: float) -> None:
        """Waits up to `seconds` for what is left to do, then ends it."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        self.thread.join(seconds)
        if self.thread.is_alive():
            with self.lock:
                left, self.waiting = [f.name for f in (self.running, self.waiting) if f is not None], None
                if self.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self.process.pid, signal.SIGKILL)
            self.say(f"checkpoint.hook did not finish in {seconds:g} s for {', '.join(left)} and was ended; run it by hand.")
            self.thread.join()

    def _work(self) -> None:
        while True:
            with self.lock:
                self.running = None
                while self.waiting is None and not self.closed:
                    self.lock.wait()
                if self.waiting is None:
                    return
                self.running, self.waiting = self.waiting, None
            self._run(self.running)

    def _run(self, folder: Path) -> None:
        text = self.command.replace("{folder}", shlex.quote(str(folder.resolve())))
        try:
            with self.log.open("a") as out:
                out.write(f"$ {text}\n")
                out.flush()
                with self.lock:
                    self.process = subprocess.Popen(
                        text, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                    )
                status = self.process.wait()
                out.write(f"status {status}\n")
        except OSError as error:
            self.say(f"checkpoint.hook could not run for {folder.name} ({error.strerror}).")
            return
        if status:
            self.say(f"checkpoint.hook ended with status {status} for {folder.name}; its output is in {self.log}.")
