"""The Triton kernels of dense heads without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")
from test_triton import run  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_in_the_interpreter() -> None:
    assert run("interpreted_dense_rnn.py") == "ok"


def test_the_near_tangent_is_for_solves_that_round_to_bf16() -> None:
    from kernels.dense_rnn import codegen
    from models.cells import load_cell

    def is_near(*of: object) -> bool:
        return "= _near_tanh(" in codegen.source(load_cell("dense_lstm"), *of)  # type: ignore[arg-type]

    assert is_near("bfloat16", "ptx") and not is_near("bfloat16", "ptx", True)
    assert not is_near("float16", "ptx") and not is_near("", "ptx")


@pytest.mark.slow
def test_large_heads_in_the_interpreter() -> None:
    assert run("interpreted_large_rnn.py") == "ok"


@pytest.mark.slow
def test_kernels_of_large_heads_compile_and_hardly_spill() -> None:
    """wgmma only of products that are 64 wide or more, which ptxas 12.8 assembles rightly."""
    import triton

    golden = json.loads((HERE / "resources_large_rnn.json").read_text())
    found = json.loads(run("compiled_large_rnn.py", *map(str, golden["arguments"])))
    for name, kernels in found.items():
        multiply = not name.startswith("chains")
        assert all(use["narrowest"] in (0, 64, 128) and (use["wgmma"] + use["mma"] > 0) == multiply for use in kernels.values()), kernels
        assert all(use.get("spilled", 0) <= 400 and use["shared"] <= 227 << 10 for use in kernels.values()), kernels
    if triton.__version__ == golden["triton"]:
        words = " ".join(map(str, golden["arguments"]))
        assert found == golden["cells"], f"If the change is wanted: python -m tests.kernels.compiled_large_rnn {words} --golden"


@pytest.mark.slow
def test_every_kernel_compiles_with_tensor_cores_and_hardly_spills() -> None:
    """Another release of Triton may count otherwise: then only much spilling is a failure."""
    import triton

    golden = json.loads((HERE / "resources_dense_rnn.json").read_text())
    found = json.loads(run("compiled_dense_rnn.py", *map(str, golden["arguments"])))
    of_matrices = found["of matrices"]
    assert all(use["wgmma"] > 0 and use["shared"] <= 227 << 10 and not use.get("spilled") for use in of_matrices.values()), of_matrices
    for kernels in (kernels for name, kernels in found.items() if name != "of matrices"):
        assert all(kernels[name]["products"] > 0 for name in ("walk", "finish", "walk_back", "finish_back")), kernels
        assert all(use["wgmma"] == 0 for use in kernels.values()), kernels  # which ptxas 12.8 assembles wrongly in blocks of 16 and 32
        assert all(use.get("spilled", 0) <= 64 and use["shared"] <= 227 << 10 for use in kernels.values()), kernels
    if triton.__version__ == golden["triton"]:
        words = " ".join(map(str, golden["arguments"]))
        assert found == golden["cells"], f"If the change is wanted: python -m tests.kernels.compiled_dense_rnn {words} --golden"
