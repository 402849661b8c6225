"""Generated problems for the operations around the recurrence: some of every kind in plain torch and in Triton's interpreter, many on a GPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import run_program
from tests.kernels.generate.case import line, main, run_one
from tests.kernels.generate.ops import KERNELS_ONLY, KINDS, run_case, usable

PLAIN = [kind for kind in KINDS if kind not in KERNELS_ONLY]
ROOT = Path(__file__).parents[2]
MODULE = "tests.kernels.generate.ops"


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the operations then run kernels")
@pytest.mark.parametrize("kind", PLAIN)
def test_in_plain_torch(kind: str) -> None:
    for seed in range(4):
        result = run_one(KINDS[kind], kind, seed, "cpu")
        assert result.ok, f"{result.error}\n{line(MODULE, kind, seed, 'cpu')}"


def test_a_case_is_determined_by_its_kind_and_seed() -> None:
    one, two, other = (run_one(KINDS["conv"], "conv", seed, "cpu") for seed in (5, 5, 6))
    assert (one.description, one.share) == (two.description, two.share) != (other.description, other.share)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_program(["-m", MODULE, "--device", "interpreter", "--cases", "8", "--seed", "3"], TRITON_INTERPRET="1")
    assert done.returncode == 0 and " 0 of 8 cases failed" in done.stdout, done.stdout + done.stderr[-2000:]


def test_steps_that_nobody_has_written_in_the_interpreter() -> None:
    """Among them a matrix that multiplies two operands in fp16, whose gradient was that of the second alone, and a lone operand that is no state, which
    the backward pass refused."""
    pytest.importorskip("triton")
    for seed in ("117", "125"):
        done = run_program(["-m", MODULE, "dense_step", seed, "--device", "interpreter"], TRITON_INTERPRET="1")
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_a_run_goes_on_where_it_stopped_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", [MODULE, "conv_history", "--cases", "3", "--seed", "9", "--out", str(out)])
    assert main(MODULE, [*KINDS], run_case, usable) == 0
    lines = [text for text in out.with_suffix(".jsonl").read_text().splitlines() if text]
    wrong = {**json.loads(lines[1]), "ok": False, "error": "y is off by 1"}
    out.with_suffix(".jsonl").write_text("\n".join([lines[0], json.dumps(wrong), lines[2][:20]]))  # the last line is torn
    assert main(MODULE, [*KINDS], run_case, usable) == 1
    assert "python -m tests.kernels.generate.ops conv_history 10 --device cpu" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["failed"] == 1 and [r["seed"] for r in written["results"]] == [9, 10, 11] and written["results"][2]["ok"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_hundred_new_cases_on_a_gpu(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    out = tmp_path / "found.json"
    words = ["--device", "cuda", "--cases", "200", "--seed", str(seed), "--out", str(out), "--jobs", str(min(8, os.cpu_count() or 1))]
    subprocess.run([sys.executable, "-m", MODULE, *words], cwd=ROOT, check=False, capture_output=True)
    failed = [r for r in json.loads(out.read_text())["results"] if not r["ok"]]
    assert not failed, "\n".join(f"{line(MODULE, r['kind'], r['seed'], 'cuda')}: {r['error']}" for r in failed)
