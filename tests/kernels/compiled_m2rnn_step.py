"""Compiles the decoding step of M2RNN to sm_90 without a GPU and prints one line of JSON: {case: {registers, spilled, shared, wgmma}}. Its own
process: Triton must not be in its interpreter. With `--golden` the figures go to resources_m2rnn_step.json, to be looked at and committed when the
kernel was changed on purpose."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)


from kernels.m2rnn_step.op import ROWS, tile  # noqa: E402
from kernels.m2rnn_step.triton import step  # noqa: E402
from tests.kernels.compiled_m2rnn import figures  # noqa: E402
from tests.kernels.registers import Registers, source_of  # noqa: E402

ACTIVATIONS = {"ROWS", "PAST", "CONV", "WEIGHT", "SKIP", "O", "NEXT"}
FREE = {"H", "K", "V", "G", "C", "row_stride"}  # numbers that need not be multiples of 16
GOLDEN = Path(__file__).with_name("resources_m2rnn_step.json")

registers = Registers("m2rnn_step")


def made(label: str, dtype: str, V: int, starts: bool) -> dict[str, int]:
    BV, warps = tile(V)
    constants: dict[str, Any] = {"HAS_STARTS": starts, "PRECISION": "tf32x3", "W": 4, "BK": ROWS, "BV": BV}

    def kind(argument: str) -> str:
        if argument == "STARTS":
            return "*u8"
        return f"*{dtype}" if argument in ACTIVATIONS else "*fp32" if argument.isupper() and len(argument) > 1 else "i32"

    source = source_of(step, constants, kind, lambda a: a not in FREE)
    return registers.figures(label, source, {"num_warps": warps}, figures)


def main(golden: bool) -> None:
    cases: dict[str, tuple[str, int, bool]] = {
        "heads of 64": ("bf16", 64, True),
        "as published": ("bf16", 16, False),
        "the largest": ("bf16", 128, True),
        "fp32": ("fp32", 64, True),
    }
    out = {label: made(label, *case) for label, case in cases.items()}
    registers.report(out, GOLDEN if golden else None)


if __name__ == "__main__":
    main("--golden" in sys.argv)
