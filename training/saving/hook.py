"""checkpoint.hook: a user's command for every complete checkpoint, in the background, such as an upload. It never ends a run."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import write_json
from models.checkpoint import MARKER, order_of

SLICE = 0.5  # seconds between signs of life while the end of a run waits


class Hook:
    """Runs `command` through the shell with {folder} replaced, one checkpoint after the other; its output goes to `log`.

    A command slower than the checkpoints come skips those that were overtaken. What it works on is not dropped: see `needs`. What it did with
    status 0 is noted beside the log (hook.json), so that a run that goes on hands the checkpoint it starts from on if that was cut short.
    """

    def __init__(self, command: str, log: Path, say: Callable[[str], Any]) -> None:
        self.command, self.log, self.say = command, log, say
        self.lock = threading.Condition()
        self.running: Path | None = None
        self.waiting: Path | None = None
        self.process: subprocess.Popen[bytes] | None = None  # None when no command runs: the process id may have passed to another process
        self.closed = self.ended = False
        self.thread = threading.Thread(target=self._work, name="hook", daemon=True)
        self.thread.start()

    def add(self, folder: Path) -> None:
        """Has the command run for `folder` as soon as it is free."""
        with self.lock:
            if self.waiting is not None:
                self.say(f"checkpoint.hook is slower than checkpoints come: skipped for {self.waiting.name}.")
            self.waiting = folder
            self.lock.notify_all()

    def take_up(self, folder: Path) -> None:
        """`add` for the checkpoint that a run starts from, unless the command is known to have finished with it."""
        if (folder / MARKER).exists() and self._done().get(folder.name) != order_of(folder):
            self.add(folder)

    def needs(self, folder: Path) -> bool:
        """Whether the command works on `folder` or is about to."""
        with self.lock:
            return folder in (self.running, self.waiting)

    def close(self, seconds: float, alive: Callable[[], Any] = lambda: None) -> None:
        """Waits up to `seconds` for what is left to do, calling `alive` meanwhile, then ends it."""
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        end = time.monotonic() + seconds
        while self.thread.is_alive() and (left := end - time.monotonic()) > 0:
            self.thread.join(min(left, SLICE))
            alive()
        with self.lock:
            unfinished = [f.name for f in (self.running, self.waiting) if f is not None]
            self.ended, self.waiting = True, None
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
        self.thread.join()
        if unfinished:
            self.say(
                f"checkpoint.hook did not finish in {seconds:g} s for {', '.join(unfinished)} and was ended; start the run again, or run it by hand."
            )

    def _work(self) -> None:
        while True:
            with self.lock:
                self.running = None
                while self.waiting is None and not self.closed:
                    self.lock.wait()
                if self.waiting is None:
                    return
                self.running, self.waiting = self.waiting, None
            try:
                self._run(self.running)
            except Exception as error:  # whatever it is, the next checkpoint gets its turn
                self.say(f"checkpoint.hook could not run for {self.running.name} ({getattr(error, 'strerror', None) or error}).")

    def _run(self, folder: Path) -> None:
        text = self.command.replace("{folder}", shlex.quote(str(folder.resolve())))
        with self.log.open("ab", buffering=0) as out:
            out.write(f"$ {text}\n".encode(errors="surrogateescape"))
            with self.lock:
                if self.ended:
                    return
                self.process = subprocess.Popen(
                    text, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
                )
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            with self.lock:  # under the lock, so that `close` never signals an id that was reaped
                status, self.process = self.process.wait(), None
            with contextlib.suppress(OSError):
                out.write(f"status {status}\n".encode())
        if not status:
            with contextlib.suppress(OSError):
                self._note(folder)
        elif not self.ended:
            self.say(f"checkpoint.hook ended with status {status} for {folder.name}; its output is in {self.log}.")

    def _done(self) -> dict[str, int]:
        """Checkpoints that the command has finished with: their numbers (`order_of`) by name."""
        try:
            return dict(json.loads(self.log.with_suffix(".json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _note(self, folder: Path) -> None:
        still_there = {name: order for name, order in self._done().items() if (folder.parent / name).exists()}
        write_json(self.log.with_suffix(".json"), {**still_there, folder.name: order_of(folder)})
