"""The fused kernels of a decoding step against the model's own forward, in Triton's interpreter (a process of its own)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.fused_steps import CASES, check

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_fused_step_is_the_models() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("fused_steps.py"))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "ok"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_captured_step_is_the_models(name: str, low: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERYWHEN_DELTA_STEP", "1")
    monkeypatch.setenv("EVERYWHEN_DENSE_STEP", "1")
    check(name, "cuda", low)
