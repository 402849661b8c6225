"""The generated Triton kernels without a GPU: their values in the interpreter, and that every one compiles for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kernels.parallel_rnn.codegen import KERNELS
from models.cells import diagonal
from tests.conftest import run_program

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(script: str, *arguments: str) -> str:
    """The last line that a program of this folder prints, forked; with Triton in its interpreter, or not, by the program's name."""
    interpreter = "0" if script.startswith("compiled") else "1"
    words = ["-m", f"tests.kernels.{script.removesuffix('.py')}", *arguments]
    done = run_program(words, timeout=500, TRITON_INTERPRET=interpreter)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1, 2])
def test_every_kernel_in_the_interpreter(part: int) -> None:
    assert run("interpreted.py", *["shared", *diagonal(), "three"][part::3]) == "ok"


def test_every_function_of_a_step_in_the_interpreter() -> None:
    assert run("function_cases.py") == "ok"


def test_every_kernel_compiles() -> None:
    compiled = json.loads(run("compiled.py", "1", "1", *diagonal(), "three"))
    assert all(set(kernels) == set(KERNELS) for kernels in compiled.values())
    # without these copies they wait for memory at every step
    walks = ("walk", "mend", "finish", "gradient", "mend_gradient", "transfer", "shoot")
    assert all(kernels[name]["copies"] > 0 for kernels in compiled.values() for name in walks), compiled


@pytest.mark.slow
def test_registers_are_those_of_the_golden_file_and_none_spill_where_speed_matters() -> None:
    """Another release of Triton may count otherwise: then only spilling is a failure."""
    import triton

    golden = json.loads((HERE / "resources.json").read_text())
    compiled = json.loads(run("compiled.py", str(golden["ahead"]), str(golden["back"]), *golden["cells"]))
    assert all(use.get("spilled", 0) == 0 for name in ("paragru", "paralstm") for use in compiled[name].values()), compiled
    if triton.__version__ == golden["triton"]:
        assert compiled == golden["cells"], (
            "If the change is wanted: python -m tests.kernels.compiled 8 4 paragru paralstm gru lstm --golden"
        )
