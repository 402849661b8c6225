"""The table of the delta rule's tasks: every arm gets its steps and is scored at its lengths, and the table is made of what is on disk."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from scripts.studies.delta_table import summary, work


def test_every_arm_is_trained_and_told_of(tmp_path: Path) -> None:
    given = argparse.Namespace(out=tmp_path, tasks=["s3", "mqar"], seeds=1, seconds=600.0, steps=20, batch=4, samples=64, scoring=0.1)
    work(1, given, time.time(), "cpu")
    rows = [json.loads(line) for line in (tmp_path / "arms.1.jsonl").read_text().splitlines()]
    assert [(r["task"], r["negative"], r["steps"], r["ended"]) for r in rows] == [
        (task, negative, 20, "steps") for task in ("s3", "mqar") for negative in (True, False)
    ]
    assert [*rows[0]["scores"]] == ["16", "32", "64", "128"] and [*rows[2]["scores"]] == ["64", "128"]
    assert summary(rows).count("\n") == 5 and "| mqar | 1 | -1 | 0 of 1 | 20 to 20 |" in summary(rows)
