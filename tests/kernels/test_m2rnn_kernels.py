"""The Triton kernels of M2RNN without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.kernels.test_triton import run  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_m2rnn.py") == "ok"


@pytest.mark.slow
def test_every_kernel_compiles_and_hardly_spills() -> None:
    """Another release of Triton may count otherwise: then only much spilling is a failure. Also where all numbers of a launch are 1, of which Triton makes
    constants."""
    import triton

    golden = json.loads((HERE / "resources_m2rnn.json").read_text())
    found = json.loads(run("compiled_m2rnn.py", *map(str, golden["arguments"])))
    assert all(use.get("spilled", 0) <= 128 and use["shared"] <= 227 << 10 for use in found.values()), found
    if triton.__version__ == golden["triton"]:
        assert found == golden["kernels"], "If the change is wanted: python -m tests.kernels.compiled_m2rnn bf16 64 64 --golden"
