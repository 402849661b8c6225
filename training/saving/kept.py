"""Which checkpoints of a run folder are whole, and which of them may go. Only whole ones take a place of checkpoint.keep: one that is torn or
altered must not push out an older one that could be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.checkpoint import checkpoints, verify

Signature = tuple[tuple[str, int, int, int], ...]


class Kept:
    """The checkpoints in `run_dir` as the writer knows them. What it has not written or verified itself is read once, and again where a file of it has
    changed since; `say` gets a line about each that is damaged."""

    def __init__(self, run_dir: Path, say: Callable[[str], Any]) -> None:
        self.run_dir, self.say = run_dir, say
        self.seen: dict[Path, tuple[Signature, bool]] = {}

    def note_whole(self, folder: Path) -> None:
        """Takes `folder`, which was just written or verified, for whole. Raises OSError."""
        self.seen[folder] = (_signature(folder), True)

    def whole(self, folder: Path) -> bool:
        """Whether every file of `folder` is as its marker says. Raises OSError."""
        now = _signature(folder)
        if folder not in self.seen or self.seen[folder][0] != now:
            problem = verify(folder)
            self.seen[folder] = (now, not problem)
            if problem:
                self.say(f"{problem} It takes none of the places of checkpoint.keep, and goes with those that are older.")
        return self.seen[folder][1]

    def too_old(self, keep: int) -> list[Path]:
        """The checkpoints written before the last `keep` whole ones, damaged ones among them; none where there are not as many. Raises OSError."""
        complete, found = checkpoints(self.run_dir), 0
        if len(complete) <= keep:
            return []
        for place in range(len(complete) - 1, 0, -1):
            found += self.whole(complete[place])
            if found == keep:
                return complete[:place]
        return []


def _signature(folder: Path) -> Signature:
    """What changes with a file of `folder`: names, sizes, times, and inodes. Raises OSError."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)
