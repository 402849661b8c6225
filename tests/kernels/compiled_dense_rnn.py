"""Compiles the kernels of cells with dense heads to sm_90 without a GPU and prints one line of JSON: {cell: {kernel: {registers, spilled, shared,
products}}}. Its own process: Triton must not be in its interpreter. `python -m tests.kernels.compiled_dense_rnn bf16 64 dense_lstm` (dtype,
channels of a head, cells); with `--golden` at the end the figures go to resources_dense_rnn.json, to be looked at and committed when a kernel was
changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton.language as tl  # noqa: E402

from kernels.dense_rnn import launch, matrices  # noqa: E402
from kernels.dense_rnn import source as forward  # noqa: E402
from kernels.parallel_rnn.cell import biased  # noqa: E402
from models.cells import load_cell  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

KERNELS = (
    "walk",
    "correct",
    "certify",
    "finish",
    "walk_back",
    "correct_back",
    "certify_back",
    "finish_back",
    "walk again",
    "walk_back again",
    "walk in order",
)
KINDS = {"bf16": (tl.bfloat16, "bfloat16"), "fp16": (tl.float16, "float16"), "fp32": (tl.float32, "")}
LIKE_PRE = {"PRE", "MAT", "EMITTED", "H0_EMITTED", "D_EMITTED", "D_KEPT", "D_PRE", "D_PROD"}
OTHERS = {
    "RESET": "*u8",
    "TODO": "*i32",
    "BAD": "*i32",
    "DONE": "*i32",
    "JOINED": "*i32",
    "JOIN": "fp32",
    "TOLERANCE": "fp32",
    "ROUND": "fp32",
}
WHOLE = {"T", "B", "SLICE", "BURN", "N", "PIECE"}
STRIDES = ("sb", "st", "sp", "se", "db", "dt", "dp", "de")
GOLDEN = Path(__file__).with_name("resources_dense_rnn.json")
D = 768

registers = Registers("dense_rnn")


def figures(kernel: Any) -> dict[str, int]:
    return {
        **resources(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "products": kernel.asm["ptx"].count("mma.sync"),
        "wgmma": kernel.asm["ptx"].count("wgmma"),
    }


def made(name: str, kernel: str, dtype: str, K: int) -> dict[str, int]:
    """Resources of one kernel."""
    kind, short = KINDS[dtype]
    rows, warps = launch.Plan.tile(K, kind.primitive_bitwidth // 8)
    fn = getattr(launch.kernels(biased(load_cell(name)), "ptx", short, narrow=rows < launch.ROWS), kernel.split()[0])
    constants = {
        "K": K, "D": D, "HEAD": D // 4, "NEAR": launch.NEAR, "HAS_RESET": True, "HALVES": False, "DOT": kind, "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        "BM": rows, "BK": launch.pad(K), "FIRST": not kernel.endswith("again"), "TRACK": not kernel.endswith("again"), "JOINS": True, "LOOK": forward.LOOK, "EARLY": True,"WITH_KEPT": False, "SCALED": dtype == "fp16", "KNOWN": False, "APART": False, "STAGES": launch.STAGES, "DEPENDENT": not kernel.startswith("walk") or kernel.endswith("again"),
    }  # fmt: skip
    constants |= {"JOINS": False, "EARLY": False, "n": 1} if kernel.endswith("in order") else {}

    def type_of(argument: str) -> str:
        if argument in LIKE_PRE:
            return f"*{dtype}"
        return OTHERS.get(argument, "*fp32" if argument.isupper() and argument not in WHOLE else "i32")

    source = source_of(fn, constants, type_of, lambda a: type_of(a).startswith("*") or a in STRIDES)
    options = {"num_warps": warps if "REC" in fn.arg_names else 1, "num_stages": 1}
    return registers.figures(f"{name} {kernel}", source, options, figures)


def of_matrices(before: bool, P: int, K: int) -> dict[str, int]:
    """Resources of the gradient of matrices, of P products side by side."""
    across, rows, warps = matrices.tile(P, K)
    constants = {
        "P": P, "K": K, "D": D, "HEAD": D // 4, "BEFORE": before, "HAS_RESET": before, "DOT": tl.bfloat16, "BR": rows, "BK": K, "BN": across,
        "STAGES": matrices.STAGES,
    }  # fmt: skip

    def type_of(argument: str) -> str:
        other = "*bf16" if argument.isupper() and argument not in WHOLE else "i32"
        return {"RESET": "*u8", "PARTIAL": "*fp32"}.get(argument, other)

    source = source_of(matrices.kernel(), constants, type_of, lambda a: type_of(a).startswith("*") or a in STRIDES)
    return registers.figures(f"of matrices {before} {P} {K}", source, {"num_warps": warps, "num_stages": 1}, figures)


def main(dtype: str, K: int, cells: list[str], golden: bool) -> None:
    out = {name: {kernel: made(name, kernel, dtype, K) for kernel in KERNELS} for name in cells}
    out["of matrices"] = {
        f"{P} x {K}": of_matrices(before, P, K) for before, P, K in ((True, 4, 64), (True, 1, 64), (False, 3, 64), (False, 4, 128))
    }
    registers.report(out, GOLDEN if golden else None, "cells", arguments=[dtype, K, *cells])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [word for word in sys.argv[3:] if not word.startswith("--")], "--golden" in sys.argv)
