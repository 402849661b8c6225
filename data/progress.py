"""What `python -m data.prepare` says while it works."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_SECONDS = 5.0  # between lines where there is no terminal


class Progress:
    """Documents, tokens and rates: a live line on a terminal, a plain one now and then where there is none."""

    def __init__(self) -> None:
        self.start = self.shown = time.perf_counter()
        self.documents = self.tokens = self.size = 0
        self.live: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self.live = Console(stderr=True).status("")
            self.live.start()

    @property
    def rate(self) -> float:
        """Million tokens a second."""
        return self.tokens / max(time.perf_counter() - self.start, 1e-9) / 1e6

    def _line(self) -> str:
        speed = self.size / max(time.perf_counter() - self.start, 1e-9) / 1e6
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens, {self.size / 1e6:.1f} MB; {self.rate:.2f} M tokens/s, {speed:.2f} MB/s"
        )

    def add(self, documents: int, tokens: int, size: int) -> None:
        self.documents, self.tokens, self.size = self.documents + documents, self.tokens + tokens, self.size + size
        now = time.perf_counter()
        if now - self.shown >= (0.2 if self.live else PLAIN_SECONDS):
            self.shown = now
            self.live.update(self._line()) if self.live else print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            self.live.stop()
        print(self._line(), file=sys.stderr, flush=True)
