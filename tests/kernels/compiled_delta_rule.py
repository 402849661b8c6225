"""Compiles the delta rule's kernels to sm_90 without a GPU and prints one line of JSON: {kernel: {registers, spilled, shared}}. Its own process:
Triton must not be in its interpreter. `python -m tests.kernels.compiled_delta_rule bf16 128 128` (dtype, K, V); with `--golden` at the end the
figures go to resources_delta_rule.json, to be looked at and committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton.language as tl  # noqa: E402

from kernels.delta_rule import launch  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

NAMES = ("project", "walk", "states", "outputs", "recover", "local", "walk_back", "pair_gradients", "query_gradients", "key_gradients")
LIKE_V = {"X", "Y", "VALUES", "DO", "O", "D_V", "D_K", "D_Q"}  # in the dtype of v
LEFT = {"INVERSE", "W", "U", "STATES", "CORRECTED", "DU", "D_STATES", "RIGHT", "D_SCORES", "D_PRODUCTS"}  # what kernels leave for others
OTHERS = {"TOTAL": "*fp64", "ROWS": "*fp64", "DOCUMENT": "*i32", "LOST": "*i32", "STARTS": "*u8", "scale": "fp32"}
GOLDEN = Path(__file__).with_name("resources_delta_rule.json")


registers = Registers("delta_rule")


def made(name: str, dtype: str, K: int, V: int, **changes: Any) -> dict[str, int]:
    """Resources of one kernel."""
    wide = dtype != "bf16"
    tile = launch.Tile(16, 4, 1) if name == "recover" else launch.sizes(name, wide, K, V)
    tile = launch.Tile(**{**tile.__dict__, **changes})
    called = "walk" if name == "states" else name
    fn = getattr(launch.gradient_kernels() if hasattr(launch.gradient_kernels(), called) else launch.kernels(), called)
    rows = min(launch.pad(V), max(1, launch.RECOVERED // launch.pad(K)))
    two = launch.two_tiles(wide, K)
    constants = {
        "TWO": two, "HAS_G": True, "HAS_STARTS": True, "NORM": True, "MARK": True, "KEEP": True, "GIVEN": name == "states", "HAS_VALUES": True, "N": 1,
        "DOT": tl.float32 if wide else tl.bfloat16, "PRECISION": "tf32x3" if wide else "ieee", "BK": launch.pad(K) // 2 if two and name != "recover" else launch.pad(K),
        "BV": rows if name == "recover" else tile.columns,
    }  # fmt: skip

    def kind(argument: str) -> str:
        if argument in LIKE_V:
            return f"*{dtype}"
        if argument in LEFT:
            return "*fp32" if wide else "*bf16"
        sizes = argument in ("S", "H", "R", "K", "V", "T")
        return OTHERS.get(argument, "*fp32" if argument.isupper() and not sizes else "i32")

    free = ("S", "T", "R", "H", "chunks", "scale", "s_b", "s_t", "g_h", "b_h", "g_b", "b_b", "g_t", "b_t")
    source = source_of(fn, constants, kind, lambda a: a not in free)
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return registers.figures(name, source, {"num_warps": tile.warps, "num_stages": tile.stages, **limit}, figures)


def figures(kernel: Any) -> dict[str, int]:
    return {**resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}


def main(dtype: str, K: int, V: int, golden: bool) -> None:
    out = {name: made(name, dtype, K, V) for name in NAMES}
    registers.report(out, GOLDEN if golden else None, arguments=[dtype, K, V])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "--golden" in sys.argv)
