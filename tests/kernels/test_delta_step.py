"""The decoding step of the delta rule: its plain form against the definition, its kernel in the interpreter, compiled for sm_90, and on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.delta_step import delta_step, reference
from tests.kernels.delta_step_cases import CASES, Sizes, problem, written_out
from tests.kernels.test_triton import run

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c[0]))
def test_the_plain_form_is_the_definition(case: tuple[Sizes, torch.dtype, bool, bool, float]) -> None:
    torch.manual_seed(0)
    sizes, _, resets, gated, strength = case
    given = problem(*sizes, torch.float32, resets, gated)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.dtype != torch.bool else a for a in given]
    arguments: list[Any] = [*wide, strength, 0.3]
    for a, b in zip(delta_step(*arguments), written_out(*arguments)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    delta = arguments[5]
    expected = reference.delta_step(*arguments)[2]
    assert not torch.equal(delta, expected)
    assert delta_step(*(*arguments, True))[2] is delta and torch.equal(delta, expected)


def test_the_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert run("interpreted_delta_step.py") == "ok"


@pytest.mark.slow
def test_the_kernel_compiles_with_wide_loads_and_does_not_spill() -> None:
    """Another release of Triton may count otherwise: then only spilling is a failure."""
    triton = pytest.importorskip("triton")
    golden, found = json.loads((HERE / "resources_delta_step.json").read_text()), json.loads(run("compiled_delta_step.py"))
    assert all(use.get("spilled", 0) == 0 and use["wide_loads"] for use in found.values()), found
    if triton.__version__ == golden["triton"]:
        assert found == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_delta_step --golden"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(64, 3, 64, 128, 1, 1, 4), (5, 4, 64, 64, 2, 2, 4), (3, 2, 40, 256, 1, 1, 4), (2, 3, 17, 33, 3, 3, 3)], ids=str
)
def test_the_kernel_on_a_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    arguments: list[Any] = [*problem(*sizes, dtype=dtype, resets=True, gated=True, device="cuda"), 2.0, 0.1]
    wanted = written_out(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
    for a, b in zip(delta_step(*arguments), wanted):
        rounding = float((b.to(a.dtype).double() - b).abs().max()) if a.dtype != torch.float32 else 0.0
        assert float((a.cpu().double() - b).abs().max()) <= 1.01 * rounding + 1e-5 * (1 + float(b.abs().max()))
