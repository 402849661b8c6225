"""The bench of several GPUs around stand-in workers: what fails, what is cut off, what is there already. What it measures is tests/parallel's."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench import multi_gpu as bench
from training.errors import UserError
from training.supervisor import descendants

STUB = """
import json, pathlib, sys, time
ranks, folder = int(sys.argv[1]), pathlib.Path(sys.argv[-1])
with open(sys.argv[0] + ".starts", "a") as starts:
    starts.write(str(ranks))
for i in range(99):
    while not (case := folder / f"case-{i:05d}.json").exists():
        if (folder / "end").exists():
            sys.exit(0)
        time.sleep(0.01)
    values = json.loads(case.read_text())
    if values["id"] == "mamba2 tiny zero1" and ranks == 2:
        sys.exit("this one fails")
    if "zero3" in values["id"] and pathlib.Path(sys.argv[0] + ".hang").exists():
        pathlib.Path(sys.argv[0] + ".hanging").touch()
        time.sleep(300)
    row = {"losses": [2.0, 1.0], "samples": [1], "tokens_per_second_per_gpu": 12.0 / ranks, "mfu": None, "memory_gib": 1.0, "received_bytes": {}, "step_seconds": 1.0}
    part = folder / "part"
    part.write_text(json.dumps({**values, **row, "gpus": ranks}))
    part.rename(folder / f"row-{i:05d}.json")
"""


def test_rows_are_kept_as_they_come_and_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, out = tmp_path / "stub.py", tmp_path / "out"
    stub.write_text(STUB)
    monkeypatch.setattr(bench, "launcher", lambda ranks: [sys.executable, str(stub), str(ranks)])
    monkeypatch.setattr(bench, "draw", lambda out: None)
    hang, hanging, starts = (Path(f"{stub}.{name}") for name in ("hang", "hanging", "starts"))
    monkeypatch.setattr(bench.Bench, "left", lambda self: 0.0 if hanging.exists() else 60.0)  # the time is up when one hangs
    hang.touch()
    before = set(descendants(os.getpid()))

    def called(*words: str) -> list[dict[str, Any]]:
        starts.write_text("")
        assert bench.main(["toy=true", "parts=zero,sequence", f"out={out}", *words]) == 0
        assert set(descendants(os.getpid())) <= before
        return [json.loads(line) for line in (out / "rows_2.jsonl").read_text().splitlines()]

    rows = called()
    done = [(row["id"], row["gpus"]) for row in rows if "losses" in row]
    assert done[:3] == [("transformer tiny zero1", 1), ("transformer tiny zero1", 2), ("paragru tiny zero1", 1)]
    assert sorted(starts.read_text()) == ["1", "2", "2"], "one start for all cases of a number of GPUs, another after a failure"
    failed = [row for row in rows if "error" in row]
    assert [(row["id"], row["gpus"]) for row in failed] == [("mamba2 tiny zero1", 2)] and "this one fails" in failed[0]["error"]
    left = [row["not_run"] for row in rows if "not_run" in row]
    assert left[0].startswith("cut off") and set(left[1:]) == {"no time left"} and len(done) + len(failed) + len(left) == len(rows)
    printed = capsys.readouterr().out
    assert "efficiency 0.500" in printed and "failed: this one fails" in printed and "not run: no time left" in printed

    for script in (hang, hanging):
        script.unlink()
    again = called()
    assert [row for row in again if (row["id"], row["gpus"]) in done] == [row for row in rows if "losses" in row], "left as they were"
    assert sum("losses" in row for row in again) == len(rows) - 1 and not any("not_run" in row for row in again)
    assert json.loads((out / "summary.json").read_text())[1]["efficiency"] == 0.5

    (out / "rows_2.jsonl").write_text(json.dumps({**again[0], "device": "another"}) + "\n")
    with pytest.raises(UserError, match="was measured on another"):
        called()


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    for word, words in (("parts=zeros", "no part 'zeros'"), ("gpus=1", "nothing to compare"), ("gpus=9", "not 9")):
        with pytest.raises(UserError, match=words):
            bench.main([word, f"out={tmp_path}"])
