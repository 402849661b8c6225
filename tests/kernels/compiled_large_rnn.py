"""Compiles the kernels of large dense heads to sm_90 without a GPU and prints one line of JSON: {cell: {kernel: {registers, spilled, shared,
wgmma}}}. Its own process: Triton must not be in its interpreter. `python -m tests.kernels.compiled_large_rnn bf16 768 dense_lstm` (dtype, channels
of a head, cells); with `--golden` at the end the figures go to resources_large_rnn.json, to be looked at and committed when a kernel was changed on
purpose."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from kernels.dense_rnn import large  # noqa: E402
from kernels.parallel_rnn.cell import biased  # noqa: E402
from models.cells import load_cell  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

KINDS = {"bf16": (tl.bfloat16, "bfloat16"), "fp16": (tl.float16, "float16"), "fp32": (tl.float32, "")}
LIKE_PRE = {"PRE", "MAT", "EMITTED", "BEFORE", "D_EMITTED", "D_KEPT", "D_PRE", "D_PROD", "U", "V"}
OTHERS = {"RESET": "*u8", "TODO": "*i32", "BAD": "*i32", "COUNTER": "*i32"}
WHOLE = {"T", "B", "SLICE", "BURN", "RT"}
KERNELS = ("walk", "walk_back", "walk_held", "walk_back_held")
STRIDES = ("sb", "st", "sp", "se", "db", "dt", "dp", "de")
GOLDEN = Path(__file__).with_name("resources_large_rnn.json")

registers = Registers("large_rnn")


def figures(kernel: Any) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    widths = [int(n) for n in re.findall(r"wgmma\.mma_async\S*?\.m64n(\d+)k", ptx)]
    return {
        **resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared, "wgmma": len(widths),
        "mma": ptx.count("mma.sync"), "narrowest": min(widths, default=0),
    }  # fmt: skip


def made(name: str, kernel: str, dtype: str, K: int, tiles: large.Tiles | None = None) -> dict[str, int]:
    """Resources of one kernel, a whole pass of a slice's first."""
    kind, short = KINDS[dtype]
    back, cell = kernel.startswith("walk_back"), load_cell(name)
    pre = torch.empty(0, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    tiles = tiles or (large.Tiles.on_chip(cell, pre, K) if kernel.endswith("_held") else large.Tiles.streamed(cell, pre, K))
    assert tiles is not None, f"The matrices of {name} of {K} channels in {dtype} do not stay on chip."
    fn = getattr(
        large.kernels(biased(cell), "ptx", short, -(-K // tiles.multiple) * tiles.multiple // tiles.depth if tiles.held else 0), kernel
    )
    rows, columns = (tiles.rows_back, tiles.columns_back) if back else (tiles.rows, tiles.columns)
    constants = {
        "E": 1, "K": K, "KP": -(-K // tiles.multiple) * tiles.multiple, "HEAD": K // 4, "NEAR": large.NEAR, "HAS_RESET": True, "DOT": kind,
        "PRECISION": "tf32x3" if dtype == "fp32" else "ieee", "BM": rows, "BN": columns, "FIRST": True, "FINISH": False, "MODE": -2,
        "BK": columns if back and dtype == "fp16" else tiles.depth_back or tiles.depth if back else tiles.depth, "WITH_KEPT": False, "SCALED": dtype == "fp16", "SAME": False, "STAGES": tiles.stages,
    }  # fmt: skip

    def type_of(argument: str) -> str:
        if argument in LIKE_PRE:
            return f"*{dtype}"
        return OTHERS.get(argument, "*fp32" if argument.isupper() and argument not in WHOLE else "i32")

    source = source_of(fn, constants, type_of, lambda a: type_of(a).startswith("*") or a in STRIDES)
    options = {"num_warps": tiles.warps_back or tiles.warps if back else tiles.warps, "num_stages": 1, "launch_cooperative_grid": True}
    return registers.figures(f"{name} {kernel}", source, options, figures)


def chain(name: str, kernel: str, K: int) -> dict[str, int]:
    """Resources of a kernel that goes from slice to slice."""
    cell = biased(load_cell(name))
    fn, block = getattr(large.kernels(cell, "ptx", "bfloat16", 0), kernel), 1 << (K - 1).bit_length()
    constants = {"K": K, "D": K, "BK": block, "DEPENDENT": False, "STAGES": large.stages_of_chain(cell, block)}
    floats = {"TOLERANCE", "ROUND"}

    def type_of(argument: str) -> str:
        return (
            "fp32"
            if argument in floats
            else "*i32"
            if argument == "DONE"
            else OTHERS.get(argument, "*fp32" if argument.isupper() else "i32")
        )

    source = source_of(fn, constants, type_of, lambda a: type_of(a).startswith("*"))
    return registers.figures(f"{name} {kernel} of {K}", source, {"num_warps": 8}, figures)


def main(dtype: str, K: int, cells: list[str], golden: bool) -> None:
    out = {name: {kernel: made(name, kernel, dtype, K) for kernel in KERNELS} for name in cells}
    out["chains of 2048"] = {
        f"{name} {kernel}": chain(name, kernel, 2048) for name in ("dense_lstm", "slstm") for kernel in ("correct", "certify_back")
    }
    registers.report(out, GOLDEN if golden else None, "cells", arguments=[dtype, K, *cells])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [word for word in sys.argv[3:] if not word.startswith("--")], "--golden" in sys.argv)
