"""Compiles the scan's kernels to sm_90 without a GPU and prints one line of JSON: {kernel: {registers, spilled, shared}}. Its own process:
Triton must not be in its interpreter. `python -m tests.kernels.compiled_ssd bf16 64 128` (dtype, P, N); with `--golden` at the end the
figures go to resources_ssd.json, to be looked at and committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels.ssd import launch  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers  # noqa: E402

SMALL = ("carry", "query_side", "key_side", "finish")  # for narrow heads and states: compiled for widths of 64, whatever is asked
LIKE_X = {"X", "K", "BM", "CM", "DY", "Y", "DX", "TO_B", "TO_C"}  # in the dtype of x
STATES = {"STATES", "D_STATES", "D_SCORES", "ENTERING"}
GOLDEN = Path(__file__).with_name("resources_ssd.json")


registers = Registers("ssd")


def made(name: str, dtype: str, P: int, N: int, **changes: Any) -> dict[str, int]:
    """Resources of one kernel; `walk_back` and `prepare_back` are the backward pass's."""
    wide, back = dtype != "bf16", name.endswith(("_back", "gradients", "_side", "finish"))
    P, N = (64, 64) if name in SMALL else (P, N)
    s = launch.sizes_of(torch.float32 if wide else torch.bfloat16, P, N, back, launch.PROGRAMS if name == "carry" else 0)
    s = launch.Pass(**{**s.__dict__, **changes})
    modules = (launch.kernels(), launch.gradient_kernels(False), launch.gradient_kernels(True))
    fn = next(getattr(m, name.removesuffix("_back")) for m in modules if hasattr(m, name.removesuffix("_back")))
    walk = fn.arg_names[1] == "K"
    constants = {
        "KEEP": True, "HAS_FIRST": True, "HAS_STARTS": True, "HAS_SKIP": True, "FINE": dtype == "fp32", "REVERSE": back, "DOT": tl.float32 if wide else tl.bfloat16,
        "PRECISION": "tf32x3" if wide else "ieee", "Q": s.Q, "BH": launch.PREPARED, "HEADS": s.heads, "STAGES": launch.QUERY_STAGES if name == "query_side" else s.stages,
        "BP": min(launch.ROWS, launch.pad(P)) if walk else launch.pad(P), "BN": min(s.columns, launch.pad(N)) if walk else launch.pad(N),
        "PARTS": launch.pad(-(-N // s.columns) * P),
    }  # fmt: skip

    if name in SMALL:
        constants |= {"P": P, "N": N, "x_t": (34 * 64), "b_t": 34 * 64, "c_t": 34 * 64, "y_t": 32 * 64, "d_t": 34 * 64}
    if name == "add_shares":
        constants |= {"BR": launch.SHARE_ROWS, "BH": 32, "BC": 32}
    if name == "recover":
        constants |= {"BN": launch.pad(N), "BP": min(launch.pad(P), launch.RECOVERED // launch.pad(N))}

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in LIKE_X:
            return f"*{dtype}"
        if argument in STATES:
            return "*fp32" if wide else "*bf16"
        return {"STARTS": "*u8", "DOCUMENT": "*i32", "LOST": "*i32"}.get(
            argument, "*fp32" if argument.isupper() and len(argument) > 1 or argument in "AD" else "i32"
        )

    signature = {a: "i32" if a in ("T", "H", "R", "P", "N", "G") and a not in constants else kind(a) for a in fn.arg_names}
    aligned = [
        i
        for i, a in enumerate(fn.arg_names)
        if a not in constants and a not in ("T", "R", "G", "rows", "programs", "chunks", "blocks", "starts_t", "dt_h")
    ]
    source = ASTSource(
        fn, signature, {a: constants[a] for a in fn.arg_names if a in constants}, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    warps, stages = (s.walk_warps, s.walk_stages) if walk else (4, 1) if name.startswith(("prepare", "recover", "finish")) else (s.warps, 3)
    return registers.figures(name, source, {"num_warps": warps, "num_stages": stages}, figures)


def figures(kernel: Any) -> dict[str, int]:
    return {**resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async")}


def main(dtype: str, P: int, N: int, golden: bool) -> None:
    out = {
        name: made(name, dtype, P, N)
        for name in (
            "prepare",
            "walk",
            "walk_back",
            "outputs",
            "carry",
            "recover",
            "query_gradients",
            "key_gradients",
            "query_side",
            "key_side",
            "finish",
            "add_shares",
        )
    }
    registers.report(out, GOLDEN if golden else None, arguments=[dtype, P, N])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "--golden" in sys.argv)
