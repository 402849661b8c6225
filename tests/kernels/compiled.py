"""Compiles every kernel of the cells named to sm_90 without a GPU and prints one line of JSON: {cell: {kernel: {registers, spilled}}}.
Its own process: Triton must not be in its interpreter. `python tests/kernels/compiled.py 8 paragru` (8: steps ahead); with `--golden` at
the end the figures go to resources.json, to be looked at and committed when a kernel was changed on purpose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import triton  # noqa: E402
from test_parallel_rnn import cells  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.parallel_rnn import launch  # noqa: E402

FP32 = {"REC", "H0", "START", "END", "PROD", "FINAL", "RESIDUAL", "CARRY", "D_REC", "D_H0", "D_FINAL"}
BF16 = {"PRE", "STATES", "D_STATES", "D_PRE", "H", "NEW"}
CONSTANTS = {"HAS_RESET": True, "GUESS": True, "CHECK": True, "SLICED": True, "BD": launch.BLOCK}
WARPS = max(1, launch.BLOCK // 64)
GOLDEN = Path(__file__).with_name("resources.json")


def kind(name: str) -> str:
    if name in CONSTANTS:
        return "constexpr"
    if name in FP32 or name in BF16:
        return "*fp32" if name in FP32 else "*bf16"
    return {"RESET": "*u8", "CONVERGED": "*i32", "COUNT": "*i32", "TOLERANCE": "fp32"}.get(name, "i32")


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        text = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=False).stdout
    return {"registers": int(re.findall(r"REG:(\d+)", text)[-1]), "spilled": int(re.findall(r"STACK:(\d+)", text)[-1])}


def main(unroll: int, names: list[str], golden: bool) -> None:
    out: dict[str, dict[str, dict[str, int]]] = {}
    for name in names:
        module = launch.kernels(next(c for c in cells() if c.name == name), unroll)
        out[name] = {}
        for kernel in ("forward", "correct", "adjoint", "scan_adjoint", "gradient", "decode"):
            fn = getattr(module, kernel)
            signature = {a: kind(a) for a in fn.arg_names}
            constants = {a: CONSTANTS[a] for a in fn.arg_names if a in CONSTANTS}
            source = ASTSource(fn=fn, signature=signature, constexprs=constants)
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
            assert ".target sm_90" in made.asm["ptx"]
            out[name][kernel] = resources(made.asm["cubin"])
    print(json.dumps(out))
    if golden:
        lines = {"triton": triton.__version__, "steps_ahead": unroll, "cells": out}
        GOLDEN.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), [word for word in sys.argv[2:] if word != "--golden"], "--golden" in sys.argv)
