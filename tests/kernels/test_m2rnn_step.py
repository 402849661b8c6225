"""The decoding step of M2RNN: its plain form against the definition, its kernel in the interpreter, compiled for sm_90, and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.m2rnn_step import m2rnn_step, reference
from tests.kernels.m2rnn_step_cases import CASES, Sizes, problem, written_out
from tests.kernels.test_triton import run

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c[0]))
def test_the_plain_form_is_the_definition(case: Any) -> None:
    torch.manual_seed(0)
    sizes: Sizes = case[0]
    given = problem(*sizes, dtype=torch.float32, resets=case[2])
    arguments: Any = [a.double() if isinstance(a, torch.Tensor) and a.dtype != torch.bool else a for a in given]
    for a, b in zip(m2rnn_step(*arguments), written_out(*arguments)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    state = arguments[7]
    expected = reference.m2rnn_step(*arguments)[2]
    assert not torch.equal(state, expected)
    assert m2rnn_step(*(*arguments, True))[2] is state and torch.equal(state, expected)


def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert run("interpreted_m2rnn_step.py") == "ok"


@pytest.mark.slow
def test_the_kernel_compiles_and_does_not_spill() -> None:
    """Another release of Triton may count otherwise: then only spilling is a failure."""
    triton = pytest.importorskip("triton")
    golden, compiled = json.loads((HERE / "resources_m2rnn_step.json").read_text()), json.loads(run("compiled_m2rnn_step.py"))
    assert all(use.get("spilled", 0) == 0 and use["shared"] <= 227 << 10 for use in compiled.values()), compiled
    if triton.__version__ == golden["triton"]:
        assert compiled == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_m2rnn_step --golden"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(64, 4, 64, 64, 4, 4), (5, 12, 64, 16, 1, 4), (2, 3, 128, 128, 3, 4), (3, 2, 24, 40, 1, 3), (1, 1, 5, 3, 1, 2)], ids=str
)
def test_the_kernel_on_a_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = problem(*sizes, dtype=dtype, resets=True, device="cuda")
    wanted = written_out(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))  # type: ignore[arg-type]
    for a, b in zip(m2rnn_step(*arguments), wanted):
        rounding = float((b.to(a.dtype).double() - b).abs().max()) if a.dtype != torch.float32 else 0.0
        assert float((a.cpu().double() - b).abs().max()) <= 1.01 * rounding + 1e-5 * (1 + float(b.abs().max()))
