"""The fused kernels of a decoding step against the model's own forward, in Triton's interpreter (a process of its own)."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import run_program
from tests.models.fused_steps import CASES, check

pytest.importorskip("triton")


@pytest.mark.slow
def test_the_fused_step_is_the_models() -> None:
    done = run_program(["-m", "tests.models.fused_steps"], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "ok"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_captured_step_is_the_models(name: str, low: bool) -> None:
    check(name, "cuda", low)
