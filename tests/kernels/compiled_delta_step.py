"""Compiles the decoding step of the delta rule to sm_90 without a GPU and prints one line of JSON: {case: {registers, spilled}}. Its own process:
Triton must not be in its interpreter. With `--golden` the figures go to resources_delta_step.json, to be looked at and committed when the
kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)


from kernels.delta_step.op import tile  # noqa: E402
from kernels.delta_step.triton import step  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

KINDS = {"STARTS": "*u8", "eps": "fp32", "strength": "fp32", "scale": "fp32"}
ACTIVATIONS = {"ROWS", "PAST", "CONV", "O", "NEXT"}
NUMBERS = {"H", "V", "K", "G", "C"}
ODD = {"G", "n"}  # numbers that need not be multiples of 16
GOLDEN = Path(__file__).with_name("resources_delta_step.json")


registers = Registers("delta_step")


def made(label: str, dtype: str, B: int, H: int, V: int, K: int, W: int, starts: bool) -> dict[str, int]:
    BV, BK = tile(B, H, V, K)
    constants = {"HAS_STARTS": starts, "GATED": True, "W": W, "PDL": W == 0, "BV": BV, "BK": BK}

    def kind(argument: str) -> str:
        return KINDS.get(argument) or (
            f"*{dtype}" if argument in ACTIVATIONS else "*fp32" if argument.isupper() and argument not in NUMBERS else "i32"
        )

    source = source_of(step, constants, kind, lambda a: a not in ODD and kind(a) != "fp32")
    return registers.figures(
        label,
        source,
        {"num_warps": 4},
        lambda kernel: {**resources(kernel.asm["cubin"]), "rows": BV, "wide_loads": kernel.asm["ptx"].count("ld.global.v4")},
    )


def main(golden: bool) -> None:
    cases: dict[str, tuple[str, int, int, int, int, int, bool]] = {
        "400m, batch 64": ("bf16", 64, 16, 64, 64, 4, False),
        "1b, batch 64": ("bf16", 64, 16, 128, 128, 4, False),
        "1b, batch 64, documents": ("bf16", 64, 16, 128, 128, 4, True),
        "1b, batch 1, fused": ("fp32", 1, 16, 128, 128, 0, False),
        "fp32, batch 2": ("fp32", 2, 8, 40, 256, 4, True),
    }
    out = {label: made(label, *case) for label, case in cases.items()}
    registers.report(out, GOLDEN if golden else None)


if __name__ == "__main__":
    main("--golden" in sys.argv)
