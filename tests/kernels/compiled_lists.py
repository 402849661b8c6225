"""Compiles the kernels of optimizers (lists of tensors, symmetric products) and of casts to 8 bits to sm_90 without a GPU and prints one line of JSON: {kernel:
{registers, spilled, wide}} (wide: loads and stores of 16 bytes in its text). Its own process: Triton must not be in its interpreter. With `--golden`
the figures go to resources_lists.json, to be looked at and committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

from triton.compiler import ASTSource  # noqa: E402

from kernels.float8 import triton as float8  # noqa: E402
from kernels.symmetric import triton as symmetric  # noqa: E402
from kernels.symmetric.sizes import DEPTH, TILE  # noqa: E402
from kernels.tensor_lists import triton as lists  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers  # noqa: E402

KINDS = {
    "ADDRESSES": "*i64", "SIZES": "*i64", "TENSOR": "*i32", "PLACE": "*i32", "OUT": "*fp32", "M": "*fp32", "X": "*bf16", "U": "*bf16",
    "DIVISOR": "*fp32", "BETA": "fp32", "KEEP": "fp32", "STEP": "fp32", "ALPHA": "fp32", "ADD": "*fp16", "SQUARES": "*fp32", "DIAGONAL": "fp32",
    **dict.fromkeys(("LR", "BETA1", "BETA2", "LOG1", "LOG2", "EPS"), "fp32"),
}  # fmt: skip
GOLDEN = Path(__file__).with_name("resources_lists.json")
registers = Registers("lists")


def figures(kernel: Any) -> dict[str, int]:
    wide = len(re.findall(r"(?:ld|st)\.global(?:\.\w+)*\.v4\.b32|(?:ld|st)\.global(?:\.\w+)*\.v2\.b64|cp\.async\.cg", kernel.asm["ptx"]))
    return {**resources(kernel.asm["cubin"]), "wide": wide, "tensor_cores": len(re.findall(r"wgmma\.mma_async", kernel.asm["ptx"]))}


def made(label: str, fn: Any, constants: dict[str, Any], warps: int, stages: int = 3, **kinds: str) -> dict[str, int]:
    signature = {name: "constexpr" if name in constants else {**KINDS, **kinds}.get(name, "i32") for name in fn.arg_names}
    aligned = [
        i for i, name in enumerate(fn.arg_names) if name not in constants and signature[name] != "fp32" and "desc" not in signature[name]
    ]
    source = ASTSource(fn, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return registers.figures(label, source, {"num_warps": warps, "num_stages": stages}, figures)


def main(golden: bool) -> None:
    block = lists.BLOCK // 4
    out = {"squares": made("squares", lists.total_squares, {"CHUNK": lists.CHUNK, "BLOCK": lists.BLOCK}, lists.WARPS)}
    for side in (1, 3):
        flags = {"SIDE": side, "NESTEROV": True, "DIVIDE": True, "BLOCK": block}
        out[f"momentum {side}"] = made(f"momentum {side}", lists.muon_momentum, flags, lists.WARPS // 2)
        out[f"step {side}"] = made(f"step {side}", lists.muon_step, {"SIDE": side, "DIVIDE": True, "BLOCK": block}, lists.WARPS // 2)
    out["scale"] = made("scale", lists.muon_scale, {"BLOCK": lists.BLOCK}, lists.WARPS, X="*bf16", SCALE="*fp32", OUT="*fp16")
    flags = {"DIVIDE": True, "CHUNK": lists.MOVED, "BLOCK": lists.TURN}
    out["adamw"] = made("adamw", lists.adamw_step, flags, lists.WARPS)
    for label, has_add, each, flipped, described in (
        ("x x^T", False, False, False, True),
        ("x^T x", False, False, True, True),
        ("a + b x + c x x^T", True, False, False, True),
        ("a + b x + c x x^T, each", True, True, False, True),
        ("x^T x by addresses", False, False, True, False),
        ("a + b x + c x x^T by addresses", True, False, False, False),
    ):
        flags = {"HAS_ADD": has_add, "HAS_DIAGONAL": has_add, "EACH": each, "DESCRIBED": described, "FLIPPED": flipped, "SAME": True}
        flags |= {"TILE": TILE, "DEPTH": DEPTH, "STRIDE_M" if flipped else "STRIDE_N": 1}
        kinds: dict[str, Any] = {"M": "i32", **dict.fromkeys(("X", "Y", "OUT"), "*fp16")}
        kinds |= dict.fromkeys(("ALPHA", "BETA", "DIAGONAL"), "*fp32") if each else {}
        if described:
            kinds |= dict.fromkeys("XY", f"tensordesc<fp16[{DEPTH}, {TILE}]>" if flipped else f"tensordesc<fp16[{TILE}, {DEPTH}]>")
        out[label] = made(label, symmetric.symmetric_product, flags, symmetric.WARPS, symmetric.STAGES, **kinds)
    types: dict[str, Any] = {"STEP": "*fp32", "LARGEST": "*fp32", "ROWS": "*i32", "COLUMNS": "*i32"}
    sizes = {"MOST": 448.0, "DIGITS": 3, "PARTS": float8.PARTS, "TILE": float8.TILE}
    for kind in ("bf16", "fp32"):
        flags = {"DENSE": kind == "fp32", "BLOCK": float8.BLOCK}
        out[f"float8 largest {kind}"] = made(f"float8 largest {kind}", float8.float8_largest, flags, float8.WARPS, X=f"*{kind}", **types)
        out[f"float8 cast {kind}"] = made(f"float8 cast {kind}", float8.float8_cast, sizes, float8.WARPS, X=f"*{kind}", **types)
    registers.report(out, GOLDEN if golden else None)


if __name__ == "__main__":
    main("--golden" in sys.argv)
