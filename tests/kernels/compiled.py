"""Compiles every kernel of the cells named to sm_90 without a GPU and prints one line of JSON: {cell: {kernel: {registers, spilled, copies}}}
(copies: asynchronous ones to shared memory in its text).
Its own process: Triton must not be in its interpreter. `python -m tests.kernels.compiled 8 4 paragru` (steps of a group, forward and backward);
with `--golden` at the end the figures go to resources.json, to be looked at and committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.parallel_rnn import codegen, launch  # noqa: E402
from tests.kernels.registers import Registers  # noqa: E402
from tests.kernels.test_parallel_rnn import cells  # noqa: E402

BF16 = {"PRE", "EMITTED", "KEPT", "D_EMITTED", "D_KEPT", "D_PRE", "H", "NEW"}
SWITCHES = {
    "HAS_RESET": True,
    "EVEN": True,
    "GIVEN": False,
    "PRODUCT": False,
    "WITH_MARKS": True,
    "CURVED": launch.CURVED,
    "SLICED": True,
    "WITH_KEPT": False,
    "DEPENDENT": True,
    "ROWS": launch.ROWS,
    "MOST_SLICES": 32,
    "DEEP": 3,
}
GOLDEN = Path(__file__).with_name("resources.json")
D = 2048


def kind(name: str) -> str:
    if name in BF16:
        return "*bf16"
    if name in ("TOLERANCE", "ROUND"):
        return "fp32"
    if name == "FLAGS":
        return "*i32"
    return "*u8" if name == "RESET" else "*fp32" if name.isupper() and name not in ("T", "SLICE", "MOST", "WINDOW") else "i32"


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=False).stdout
    return {"registers": int(re.findall(r"REG:(\d+)", text)[-1]), "spilled": int(re.findall(r"STACK:(\d+)", text)[-1])}


def figures(made: Any) -> dict[str, int]:
    return {**resources(made.asm["cubin"]), "copies": sum(made.asm["ptx"].count(f"cp.async.{level}") for level in ("ca", "cg"))}


def main(ahead: int, back: int, names: list[str], golden: bool) -> None:
    out: dict[str, dict[str, dict[str, int]]] = {}
    registers = Registers(f"rnn {ahead} {back}")
    for name in names:
        cell = next(c for c in cells() if c.name == name)
        module = launch.kernels(cell, ahead, back, "ptx", "bfloat16")
        P = len(cell.pre)
        constants = {
            **SWITCHES,
            "D": D,
            "HEAD": D // 4,
            "ST": P * D // 4,
            "SP": D // 4,
            "D_ST": P * D // 4,
            "D_SP": D // 4,
            "MARK": launch.MARK,
            "STRETCH": launch.STRETCH,
        }
        out[name] = {}
        for kernel in codegen.KERNELS:
            fn, columns = getattr(module, kernel), launch.COLUMNS if kernel == "shoot" else launch.BLOCK
            constants["BD"], tile = columns, columns * (launch.ROWS if kernel == "shoot" else 1)
            signature = {a: "constexpr" if a in constants else kind(a) for a in fn.arg_names}
            aligned = {
                (i,): [["tt.divisibility", 16]]
                for i, a in enumerate(fn.arg_names)
                if signature[a] not in ("constexpr", "fp32") and a != "n"
            }
            source = ASTSource(
                fn=fn, signature=signature, constexprs={a: constants[a] for a in fn.arg_names if a in constants}, attrs=aligned
            )
            options = {"num_warps": max(1, tile // (32 * launch.EACH) if kernel == "shoot" else tile // 64)}
            if kernel != "decode":
                options["maxnreg"] = launch.REGISTERS
            out[name][kernel] = registers.figures(f"{name} {kernel}", source, options, figures)
    registers.report(out, GOLDEN if golden else None, "cells", ahead=ahead, back=back)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [word for word in sys.argv[3:] if not word.startswith("--")], "--golden" in sys.argv)
