"""Compiles the kernels of packed attention to sm_90 without a GPU and prints one line of JSON: {kernel: {registers, spilled, tensor_cores, shared,
copies}}. Its own process: Triton must not be in its interpreter. With `--golden` the figures go to resources_attention.json, to be looked at and
committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

from triton.compiler import ASTSource  # noqa: E402

from kernels.attention import launch  # noqa: E402
from kernels.attention import triton as attention  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers  # noqa: E402

KINDS = {"FIRST": "*i32", "LAST": "*i32", "MARKS": "*i32", "LSE": "*fp32", "DELTA": "*fp32", "c": "fp32", "scale": "fp32"}
GOLDEN = Path(__file__).with_name("resources_attention.json")
registers = Registers("attention")


def figures(kernel: Any) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    counts = {"tensor_cores": ptx.count("wgmma.mma_async"), "shared": kernel.metadata.shared, "copies": ptx.count("cp.async.cg")}
    return {**resources(kernel.asm["cubin"]), **counts}


def made(name: str, size: launch.Blocks, width: int, documents: bool = True, window: bool = False, R: int = 1) -> dict[str, int]:
    fn = getattr(attention, f"attention_{name}")
    constants = {"R": R, "M": size.M, "N": size.N, "W": width, "DOCUMENTS": documents, "WINDOW": window}
    signature = {
        a: "constexpr" if a in constants else KINDS.get(a, "*bf16" if a.isupper() and a not in ("T", "L", "H") else "i32")
        for a in fn.arg_names
    }
    odd = (*constants, "c", "scale", "window", "H", "blocks")
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(fn.arg_names) if a not in odd}
    source = ASTSource(fn, signature, constants, aligned)
    label = f"{name} {width}{' documents' * documents}{' window' * window}{f' {R}' if R > 1 else ''}"
    return registers.figures(label, source, {"num_warps": size.warps, "num_stages": size.stages}, figures)


def main(golden: bool) -> None:
    out = {}
    for width in (64, 128):
        for name, table in (("forward", launch.FORWARD), ("query_gradients", launch.QUERIES), ("key_gradients", launch.KEYS)):
            out[f"{name} {width}"] = made(name, table[width], width)
    out["key_gradients 64 of four heads in a window"] = made("key_gradients", launch.KEYS[64], 64, False, True, 4)
    for name in ("forward_mend", "query_mend", "key_mend"):
        out[f"{name} 64"] = made(name, launch.MEND, 64)
    registers.report(out, GOLDEN if golden else None)


if __name__ == "__main__":
    main("--golden" in sys.argv)
