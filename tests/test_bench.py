"""What the benches share: one clock, one way of writing results, and the list of them. What they measure needs a GPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy
import pytest
import torch

from scripts.bench import __main__ as listing
from scripts.bench import losses_worker, timing

CPU = torch.device("cpu")


def test_every_bench_is_listed_and_can_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(listing.BENCHES, lines):
        assert line.startswith(name) and len(line) > 40
        importlib.import_module(f"scripts.bench.{name}")
    programs = {path.stem for path in Path(listing.__file__).parent.glob("*.py") if "if __name__" in path.read_text()}
    assert programs - {"__main__", "losses_worker", "multi_gpu_worker", "step_worker"} == set(listing.BENCHES)


def test_losses_of_two_settings_are_of_the_same_weights_and_rows(tmp_path: Path) -> None:
    numpy.random.default_rng(0).integers(0, 60, 4000).astype(numpy.uint16).tofile(tmp_path / "tokens.bin")
    given = {
        "tokens": str(tmp_path / "tokens.bin"),
        "name": "transformer-toy",
        "seeds": [0, 3],
        "vocabulary": 64,
        "rows": 2,
        "length": 16,
        "steps": 4,
        "lr": 1e-2,
    }
    runs = []
    for arm, more in (
        ("plain", {"held_out": 1, "held_out_tokens": str(tmp_path / "tokens.bin")}),
        ("plain", {}),
        ("narrow", {}),
        ("plain", {"warm_up": 1}),
    ):
        losses_worker.main({**given, "arm": arm, "out": str(tmp_path / "out.json"), **more})
        runs.append(json.loads((tmp_path / "out.json").read_text())["runs"])
    plain, again, narrow, faster = ({seed: run["losses"] for seed, run in one.items()} for one in runs)
    assert plain == again and len(plain["0"]) == 4 and len(runs[0]["3"]["held_out"]) == 1 and plain["0"] != plain["3"]
    assert plain["0"][0] == faster["0"][0] and plain["0"][2:] != faster["0"][2:] and narrow != plain
    assert max(abs(a - b) for a, b in zip(plain["0"], narrow["0"])) < 1e-2
    with pytest.raises(SystemExit, match="The arm is 'wide'; choose one of plain"):
        losses_worker.main({**given, "arm": "wide", "out": str(tmp_path / "out.json")})


def test_a_bench_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["mixers"]) == 2
    assert "There is no bench 'mixers'" in capsys.readouterr().err


def test_one_clock(tmp_path: Path) -> None:
    runs: list[int] = []
    assert timing.milliseconds(lambda: runs.append(1), 4, CPU) >= 0 and len(runs) == timing.WARM_UPS + 4
    assert timing.copy_bandwidth(CPU) > 0
    met: list[int] = []
    assert timing.seconds(lambda: met.append(len(met)), CPU, lambda: met.append(7)) >= 0 and met == [7, 1]
    with timing.unmeasured():
        runs.clear()
        assert timing.milliseconds(lambda: runs.append(1)) == 1.0 and len(runs) == 1


def test_results_are_whole_after_every_part(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    results = timing.Results(out, CPU, copy_bytes_per_ms=2.0)
    results.append("rows", {"ms": 1.0})
    results.append("rows", timing.attempted(lambda: 1 / 0))
    results.keep("accuracy", {"y": 1e-7})
    results.item("items", "one", {"ms": 2.0})
    written = json.loads(out.read_text())
    assert written["rows"] == [{"ms": 1.0}, {"error": "ZeroDivisionError: division by zero"}]
    assert written["accuracy"] == {"y": 1e-7} and written["items"] == {"one": {"ms": 2.0}}
    assert {"commit", "torch", "device"} <= written.keys() and written["copy_bytes_per_ms"] == 2.0
