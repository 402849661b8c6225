"""How far a measurement is: a bar on a terminal, a plain line now and then elsewhere, on the first process only."""

from __future__ import annotations

import sys
import time
from typing import Any

from training.launch import first_of_all

QUIET = 10.0  # seconds between plain lines, at least


class Progress:
    """Called with (done, total); a context manager, so that the bar goes when the work ends or fails.

    unit: what is counted; every: also a plain line at the beginning and the end, for work that shows nothing else.
    """

    def __init__(self, name: str, unit: str = "", every: bool = False) -> None:
        self.name, self.unit, self.every = name, unit, every
        self.silent = not first_of_all()
        self.bar: Any = None
        self.task: Any = None  # of the bar
        self.start = self.last_line = time.monotonic()
        self.first = True

    def __enter__(self) -> Progress:
        if not self.silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        if self.silent:
            return
        if self.bar is not None:
            self.task = self.bar.add_task(self.name, total=total) if self.task is None else self.task
            self.bar.update(self.task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.last_line >= QUIET or (self.every and (self.first or done >= total)):
            print(
                f"{self.name}: {done:,} of {total:,} {self.unit}".rstrip() + f" after {now - self.start:.0f} s", file=sys.stderr, flush=True
            )
            self.last_line, self.first = now, False
