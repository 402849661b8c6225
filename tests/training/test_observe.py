"""What a run says of its ranks: the one that holds the others up is named, and profiles are written."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_ranks
from tests.training.test_runs import QUIET, ok
from training.result import StepResult
from training.watch.observe import RankWatch

SLOW_RANK = """
import json, sys, time
from training.result import StepResult
from training.world import start_distributed
from training.watch.observe import RankWatch
world = start_distributed("cpu")
watch = RankWatch(world, 2)
for step in (1, 2):
    world.clock.lap()
    began = time.perf_counter()
    if world.rank == 1:
        time.sleep(1.0)
    world.sum([1.0])
    said = watch.step(step, StepResult(0.0, 0.0, 1, "", time.perf_counter() - began, world.clock.lap()), 0.0)
    assert bool(said) == (step == 2)
if world.main:
    print(json.dumps(said))
"""


def test_a_slow_rank_is_named_and_the_other_is_seen_to_wait(tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(SLOW_RANK)
    done = run_ranks(2, [str(program)], PYTHONPATH=str(ROOT))
    said = json.loads([line for line in ok(done).splitlines() if line.startswith("{")][-1])
    assert said["slowest_rank"] == 1 and said["slowest_ratio"] > 1
    busy, waited = said["ranks"]["own_seconds"], said["ranks"]["communication"]
    assert busy[1] > busy[0] and waited[0] > waited[1] and all(len(column) == 2 for column in said["ranks"].values())


def test_profile_writes_a_trace_of_every_rank_and_the_log_names_the_ranks(
    train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out = ok(train("run", *QUIET, "model=transformer", "profile=true", "profile_start=2", "profile_steps=2", ranks=2))  # of few operations
    assert "slowest rank" in out and "profile written" in out
    folder = tmp_path / "run" / "profile"
    assert {p.name for p in folder.iterdir()} == {
        f"{kind}-rank0000{r}.{end}" for kind, end in (("trace", "json.gz"), ("operations", "txt")) for r in (0, 1)
    }
    with gzip.open(folder / "trace-rank00001.json.gz", "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("addmm" in n or "aten::mm" in n for n in names)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seen = [row for row in rows if "ranks" in row]
    assert seen and all(0 <= row["communication_share"] <= 1 and row["peak_gib"] > 0 for row in seen)


def test_the_certificate_of_the_recurrences_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    class World:
        device = torch.device("cpu")

        def gather(self, row: list[float]) -> list[list[float]]:
            return [row, [*row[:-4], 3e-6, 2.0, 0.25, 0.5]]  # another rank's solves went worse

    none = {"tiles": 0, "residual": 0.0, "corrections": 0, "sequential": 0.0, "sequential_backward": 0.0}
    reports = iter([none, {**none, "tiles": 64, "residual": 1e-7, "corrections": 1}])
    monkeypatch.setattr("kernels.parallel_rnn.last_report", lambda: next(reports))
    watch = RankWatch(World(), 1)  # type: ignore[arg-type]
    result = StepResult(0.0, 0.0, 1, "", 0.1, 0.0)
    assert not [key for key in watch.step(1, result, 0.0) if key.startswith("solve_")]  # nothing was solved over slices
    said = watch.step(2, result, 0.0)
    assert (said["solve_residual"], said["solve_corrections"], said["solve_sequential"], said["solve_sequential_backward"]) == (
        3e-6,
        2.0,
        0.25,
        0.5,
    )
