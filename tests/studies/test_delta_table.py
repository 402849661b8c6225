"""The table of the delta rule's tasks: every arm gets its steps and is scored at its lengths, and the table is made of what is on disk."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.studies import equal_cells
from scripts.studies.delta_table import kept_of, settings, summary, work


def test_every_arm_is_trained_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_cells, "SCORED", 8)
    given = argparse.Namespace(out=tmp_path, ranges=[-1, 0], seeds=1, seconds=600.0, steps=20, length=8, batch=8, first=2, head_dim=16)
    for task in ("s3", "mqar"):
        work(task, 2, given, time.time(), "cpu")
    rows = [json.loads(line) for task in ("s3", "mqar") for line in (tmp_path / f"arms.{task}.2.jsonl").read_text().splitlines()]
    assert [(r["task"], r["negative"], r["steps"], r["ended"]) for r in rows] == [
        (task, negative, 20, "steps") for task in ("s3", "mqar") for negative in (True, False)
    ]
    assert [*rows[0]["scores"]] == ["8", "16", "32", "64"] and [*rows[2]["scores"]] == ["64", "128", "256", "512"]
    assert summary(rows).count("\n") == 5 and "| mqar | 2 | -1 | 0 of 1 | 20 to 20 |" in summary(rows)
    layer = settings("a5", 3, True, given)["layer"]
    assert "eases" not in settings("a5", 3, True, given), "its tables are of a rate that falls at the longest words alone"
    assert (layer["updates"], layer["negative"], layer["d_conv"], settings("a5", 3, True, given)["falls"]) == (3, True, 2, True)


def test_what_the_clock_cut_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_cells, "SCORED", 8)
    taken, burst = [0], equal_cells.Learner.burst

    def counted(learner: equal_cells.Learner) -> None:
        taken[0] += 10
        burst(learner)

    monkeypatch.setattr(equal_cells.Learner, "burst", lambda learner, steps: counted(learner))
    given = argparse.Namespace(out=tmp_path, ranges=[-1], seeds=1, seconds=600.0, steps=20, length=8, batch=8, first=2, head_dim=16)

    def row() -> dict[str, Any]:
        taken[0] = 0
        work("s3", 1, given, time.time(), "cpu")
        return json.loads((tmp_path / "arms.s3.1.jsonl").read_text())

    first = row()
    assert first["steps"] == taken[0] == 20
    assert row() == first and not taken[0]  # it has had its steps
    given.steps = 40
    assert row()["steps"] == 40 and taken[0] == 20
    given.batch = 4  # other settings: anew
    assert row()["steps"] == taken[0] == 40
    (tmp_path / "states.s3.1.pt").write_bytes(b"cut")
    assert not kept_of(tmp_path / "states.s3.1.pt", torch.device("cpu"))
