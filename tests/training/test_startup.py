"""The start-up by parts: it begins with the process, once, and its parts add up."""

from __future__ import annotations

import time

import psutil
import pytest

from training.watch import startup
from training.watch.startup import StartUp


def test_parts_begin_with_the_process_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_counted", False)
    first, age = StartUp(), time.time() - psutil.Process().create_time()
    for part in ("imports", "data", "imports"):
        first.lap(part)
    row = first.row()
    assert list(row["startup"]) == ["imports", "data"] and row["startup_seconds"] == pytest.approx(sum(first.seconds.values()))
    assert row["startup_seconds"] >= age - 0.1 and f"{row['startup_seconds']:.1f} s (imports " in first.line()
    later = StartUp()  # of a second run in this process
    later.lap("imports")
    assert later.row()["startup_seconds"] < row["startup_seconds"]
