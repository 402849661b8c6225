"""Compiles the kernels of M2RNN to sm_90 without a GPU and prints one line of JSON: {kernel: {registers, spilled, shared, wgmma}}. Its own process:
Triton must not be in its interpreter. `python -m tests.kernels.compiled_m2rnn bf16 64 64` (dtype, K, V); with `--golden` at the end the figures go
to resources_m2rnn.json, to be looked at and committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton.language as tl  # noqa: E402

from kernels.m2rnn import launch  # noqa: E402
from kernels.m2rnn import triton as kernels  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

LIKE_V = {"Q", "X", "Y", "DO", "O", "DQ", "DX", "DY"}  # in the dtype of v
OPERANDS = {"W", "ADJOINTS"}  # in the dtype of products
SIZES = {"B", "T", "H", "K", "V", "R"}
FREE = {"B", "T", "H", "R", "blocks", "chunks", "first", "begin", "end", "longest"}
KERNELS = ("walk", "slopes", "adjoint", "gradients")
GOLDEN = Path(__file__).with_name("resources_m2rnn.json")

registers = Registers("m2rnn")


def made(name: str, dtype: str, K: int, V: int, ones: bool = False, tile: tuple[int, int] | None = None) -> dict[str, int]:
    """Resources of one kernel. ones: with what a launch of one step of one row makes constants of; tile: another than its own."""
    narrow, fn = dtype == "bf16", getattr(kernels, name)
    columns, filled = launch.pad(V, launch.NARROWEST), launch.pad(K, launch.NARROWEST)
    rows, warps = tile or (launch.TILES[columns] if narrow else launch.TILES_WIDE)[name]
    constants: dict[str, Any] = {
        "HAS_H0": True, "HAS_STARTS": True, "HAS_BORDERS": True, "CHUNK": launch.EVERY, "DOT": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "ieee" if narrow else "tf32x3", "FAST": narrow, "BK": min(rows, filled), "BV": columns, "ROWS": filled,
    }  # fmt: skip

    if ones:
        constants |= {a: 1 for a in fn.arg_names if (a in SIZES or a.islower()) and a not in {*constants, "first", "begin", "longest"}}

    def kind(argument: str) -> str:
        if argument in LIKE_V:
            return f"*{dtype}"
        if argument in OPERANDS:
            return "*bf16" if narrow else "*fp32"
        if argument == "SLOPES":
            return "*fp16" if narrow else "*fp32"
        return "*u8" if argument == "STARTS" else "*fp32" if argument.isupper() and argument not in SIZES else "i32"

    source = source_of(fn, constants, kind, lambda a: a not in FREE)
    return registers.figures(
        name + (" of ones" if ones else f" {tile[0]}" if tile else ""), source, {"num_warps": warps, "num_stages": 1}, figures
    )


def figures(kernel: Any) -> dict[str, int]:
    return {**resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}


def main(dtype: str, K: int, V: int, golden: bool) -> None:
    out = {name: made(name, dtype, K, V) for name in KERNELS}
    for name, tiles in launch.WALKS.get(launch.pad(V, launch.NARROWEST), {}).items() if dtype == "bf16" else ():
        out |= {
            f"{name} {tile[0]}": made(name, dtype, K, V, tile=tile)
            for tile in tiles
            if tile != launch.TILES[launch.pad(V, launch.NARROWEST)][name]
        }
    for name in KERNELS:
        made(name, dtype, K, V, ones=True)
    registers.report(out, GOLDEN if golden else None, arguments=[dtype, K, V])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "--golden" in sys.argv)
