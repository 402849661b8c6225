"""The scan's Triton kernels without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from test_triton import run  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_ssd.py") == "ok"


@pytest.mark.slow
def test_every_kernel_compiles_with_tensor_cores_and_hardly_spills() -> None:
    """Another release of Triton may count otherwise: then only much spilling is a failure."""
    import triton

    golden = json.loads((HERE / "resources_ssd.json").read_text())
    found = json.loads(run("compiled_ssd.py", *map(str, golden["arguments"])))
    assert all(use["wgmma"] > 0 for name, use in found.items() if name not in ("prepare", "recover")), found
    assert all(use.get("spilled", 0) <= 160 and use["shared"] <= 227 << 10 for use in found.values()), found
    if triton.__version__ == golden["triton"]:
        assert found == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_ssd bf16 64 128 --golden"
