"""The delta rule's Triton kernels without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.conftest import run_ranks  # noqa: E402
from tests.kernels.test_triton import run  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_delta_rule.py") == "ok"


@pytest.mark.slow
def test_all_at_once_on_two_ranks_in_the_interpreter() -> None:
    done = run_ranks(2, ["-m", "tests.kernels.delta_rule_ranks", "cpu", "200", "float32"], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("is equal") == 2


@pytest.mark.slow
def test_every_kernel_compiles_with_tensor_cores_and_hardly_spills() -> None:
    """Another release of Triton may count otherwise: then only much spilling is a failure. Some is wanted: with fewer registers more programs run at
    once (`launch.NARROW`)."""
    import triton

    golden = json.loads((HERE / "resources_delta_rule.json").read_text())
    found = json.loads(run("compiled_delta_rule.py", *map(str, golden["arguments"])))
    assert all(use["wgmma"] > 0 for name, use in found.items() if name != "recover"), found
    assert all(use.get("spilled", 0) <= 320 and use["shared"] <= 227 << 10 for use in found.values()), found
    if triton.__version__ == golden["triton"]:
        assert found == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_delta_rule bf16 128 128 --golden"
