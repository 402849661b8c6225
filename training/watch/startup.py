"""What passes between the start of the process and the end of its first step, by parts."""

from __future__ import annotations

import time
from typing import Any

import psutil

_counted = False  # whether this process's own start has been counted: a later run in it, of a sweep, begins where it is made


class StartUp:
    """A stopwatch whose laps have names; the first begins with the process, so that the interpreter and imports count."""

    def __init__(self) -> None:
        global _counted
        now = time.time()
        self.last = now if _counted else min(now, psutil.Process().create_time())
        _counted = True
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """What has passed since the last call was `part`."""
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + max(0.0, now - self.last)
        self.last = now

    def line(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"start-up: {sum(self.seconds.values()):.1f} s ({parts})"

    def row(self) -> dict[str, Any]:
        """The same for metrics.jsonl."""
        return {"startup_seconds": sum(self.seconds.values()), "startup": {part: round(s, 3) for part, s in self.seconds.items()}}
