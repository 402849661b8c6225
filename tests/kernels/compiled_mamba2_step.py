"""Compiles the decoding step of Mamba-2 to sm_90 without a GPU and prints one line of JSON: {case: {registers, spilled}}. Its own process:
Triton must not be in its interpreter. With `--golden` the figures go to resources_mamba2_step.json, to be looked at and committed when the
kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)


from kernels.mamba2_step.op import tile  # noqa: E402
from kernels.mamba2_step.triton import step  # noqa: E402
from tests.kernels.compiled import resources  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

KINDS = {"STARTS": "*u8", "low": "fp32", "high": "fp32"}
ACTIVATIONS = {"ROWS", "PAST", "CONV", "CONV_BIAS", "Y", "NEXT"}
ODD = {"groups"}  # a number that need not be a multiple of 16
GOLDEN = Path(__file__).with_name("resources_mamba2_step.json")


registers = Registers("mamba2_step")


def made(label: str, dtype: str, B: int, H: int, P: int, N: int, starts: bool) -> dict[str, int]:
    BP, BN = tile(B, H, P, N)
    constants = {"HAS_STARTS": starts, "W": 4, "BP": BP, "BN": BN}

    def kind(argument: str) -> str:
        return KINDS.get(argument) or (
            f"*{dtype}" if argument in ACTIVATIONS else "*fp32" if argument.isupper() and len(argument) > 1 else "i32"
        )

    source = source_of(step, constants, kind, lambda a: a not in ODD and kind(a) != "fp32")
    return registers.figures(
        label,
        source,
        {"num_warps": 4},
        lambda kernel: {**resources(kernel.asm["cubin"]), "rows": BP, "wide_loads": kernel.asm["ptx"].count("ld.global.v4")},
    )


def main(golden: bool) -> None:
    cases: dict[str, tuple[str, int, int, int, int, bool]] = {
        "400m, batch 64": ("bf16", 64, 32, 64, 64, False),
        "1b, batch 64": ("bf16", 64, 64, 64, 128, False),
        "1b, batch 64, documents": ("bf16", 64, 64, 64, 128, True),
        "fp32, batch 2": ("fp32", 2, 8, 40, 256, True),
    }
    out = {label: made(label, *case) for label, case in cases.items()}
    registers.report(out, GOLDEN if golden else None)


if __name__ == "__main__":
    main("--golden" in sys.argv)
