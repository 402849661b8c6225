"""Compiles the kernels of whole layers but the recurrence (convolution, norm, SwiGLU, residual, rotary positions, loss) to sm_90 without a GPU and prints one line of JSON: {kernel: {registers,
spilled}}. Its own process: Triton must not be in its interpreter. With `--golden` the figures go to resources_mixer.json, to be looked at
and committed when a kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import cross_entropy, parts  # noqa: E402
from kernels.add_norm import triton as add_norm  # noqa: E402
from kernels.cross_entropy import triton as cross  # noqa: E402
from kernels.embedding import triton as embedding  # noqa: E402
from kernels.gated_norm import launch as norm  # noqa: E402
from kernels.linear import triton as casts  # noqa: E402
from kernels.residual import triton as residual  # noqa: E402
from kernels.rotary import triton as rotary  # noqa: E402
from kernels.short_conv import launch as conv  # noqa: E402
from kernels.step_sizes import triton as step_sizes  # noqa: E402
from kernels.swiglu import triton as swiglu  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers  # noqa: E402

FP32 = {
    "A",
    "B",
    "C",
    "GIVEN",
    "TABLE",
    "FREQUENCIES",
    "WEIGHT",
    "BIAS",
    "PARTIAL",
    "D_SCALE",
    "D_WEIGHT",
    "NLL",
    "LOG_Z",
    "G_NLL",
    "G_LOG_Z",
}
ODD = {"T", "N", "slices", "ROWS"}  # numbers that need not be multiples of 16
GOLDEN = Path(__file__).with_name("resources_mixer.json")


def made(label: str, fn: Any, constants: dict[str, Any], warps: int) -> dict[str, int]:
    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("NA", "NB", "NC"):
            return "i32"
        if name.isupper() and len(name) > 1 or name in "ABCXYHQ":
            return {
                "STARTS": "*u8",
                "LABELS": "*i64",
                "ADDRESSES": "*i64",
                "SIZES": "*i64",
                "TENSOR": "*i32",
                "PLACE": "*i32",
                "TENSORS": "i32",
                "IDS": "*i32",
                "BEGINS": "*i32",
                "ORDER": "*i64",
                "WORDS": "*i32",
                "W": "i32",
                "POSITIONS": "*i64",
                "EPS": "fp32",
                "FACTOR": "fp32",
                "LEAST": "fp32",
                "MOST": "fp32",
                "SLICE": "i32",
                "ROWS": "i32",
            }.get(name, "*fp32" if name in FP32 else "*bf16")
        return "i32"

    aligned = [i for i, name in enumerate(fn.arg_names) if name not in constants and name not in ODD and kind(name) != "fp32"]
    source = ASTSource(fn, {name: kind(name) for name in fn.arg_names}, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return registers.figures(label, source, {"num_warps": warps}, lambda kernel: resources(kernel.asm["cubin"]))


registers = Registers("mixer")


def main(golden: bool) -> None:
    out: dict[str, dict[str, int]] = {}
    gpu = torch.device("cuda")
    for back in (False, True):
        fn, plan = (
            (conv.kernels.backward, conv.Plan(8, 4096, 2048, gpu, True))
            if back
            else (conv.kernels.forward, conv.Plan(8, 4096, 2048, gpu, False))
        )
        for packed in (False, True):
            flags = {"W": 4, "SILU": True, "HAS_HISTORY": packed, "HAS_STARTS": packed, "U": plan.unroll, "BD": plan.block}
            name = f"convolution {'backward' if back else 'forward'}{', documents' * packed}"
            out[name] = made(name, fn, flags, plan.warps)
        for K in (2048, 4096):
            BR, BK, warps = norm.tile(K, gpu, norm.PER_WARP_BACK if back else norm.PER_WARP)
            for label, gated, first in (("norm then gate", True, True), ("gate then norm", True, False), ("norm", False, False)):
                flags = {"G": 1, "HAS_GATE": gated, "NORM_FIRST": first, "BR": BR, "BK": BK}
                name = f"{label} {'backward' if back else 'forward'} {K}"
                out[name] = made(name, norm.kernels.backward if back else norm.kernels.forward, flags, warps)
    for name in ("losses", "logits_gradient", "losses_and_gradient"):
        sizes = (cross_entropy.BLOCK, cross_entropy.WARPS)
        BV, warps = (cross_entropy.BLOCK_AT_ONCE, cross_entropy.WARPS_AT_ONCE) if name == "losses_and_gradient" else sizes
        out[f"cross entropy {name}"] = made(f"cross entropy {name}", getattr(cross, name), {"BV": BV}, warps)
    flags = {**dict(zip(("A", "REST"), cross_entropy.pieces(50432))), "STAGES": cross_entropy.STAGES}
    fn = cross.losses_and_gradient_by_rows
    out["cross entropy by rows"] = made("cross entropy by rows", fn, flags, cross_entropy.WARPS_AT_ONCE)
    for name in ("forward", "backward"):
        out[f"swiglu {name}"] = made(f"swiglu {name}", getattr(swiglu, name), {"BLOCK": swiglu.BLOCK}, swiglu.WARPS)
    BR, BD = residual.tile(32768, 1024, gpu)
    out["residual forward"] = made("residual forward", residual.forward, {"BR": BR, "BD": BD}, residual.WARPS)
    out["residual backward"] = made("residual backward", residual.backward, {"COPY": True, "BR": BR, "BD": BD}, residual.WARPS)
    BR, BH = step_sizes.tile(32, gpu)
    for name in ("forward", "backward"):
        out[f"step sizes {name}"] = made(f"step sizes {name}", getattr(step_sizes, name), {"BR": BR, "BH": BH}, step_sizes.WARPS)
    out["sum of runs"] = made("sum of runs", parts.sum_of_runs, {"ROWS": 256, "COLUMNS": 16}, 8)
    for scaled in (False, True):
        for back in (False, True):
            BR, BD, warps = add_norm.tile(1024, gpu, add_norm.PER_WARP_BACK if back else add_norm.PER_WARP)
            name = f"add and norm {'backward' if back else 'forward'}{', scaled' * scaled}"
            flags = {"SCALED": scaled, "BR": BR, "BD": BD} | (
                {"COPY": True, "HAS_DR": True, "STAGES": add_norm.stages(1024)} if back else {}
            )
            out[name] = made(name, add_norm.backward if back else add_norm.forward, flags, warps)
    flags = {"BLOCK": casts.BLOCK}
    out["casts of weights"] = made("casts of weights", casts.cast_weights, flags, casts.WARPS)
    out["casts of all weights"] = made("casts of all weights", casts.cast_listed, flags | {"CHUNK": casts.ALL}, casts.WARPS)
    for name in ("pieces", "rows"):
        flags = {"PIECE": embedding.PIECE, "AT_ONCE": embedding.AT_ONCE, "BD": embedding.COLUMNS}
        fn = getattr(embedding, f"embedding_{name}")
        out[f"embedding {name}"] = made(f"embedding {name}", fn, flags, embedding.WARPS)
    for name, back in (("rotary", False), ("rotary backward", True)):
        flags = {"H": 8, "G": 8, "BACK": back, "HEADS": rotary.HEADS, "BR": rotary.ELEMENTS // 64, "BK": 64}
        out[name] = made(name, rotary.turn, flags, rotary.WARPS)
    registers.report(out, GOLDEN if golden else None)


if __name__ == "__main__":
    main("--golden" in sys.argv)
