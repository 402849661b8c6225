"""Writes the kernel that projects the inputs of a nonlinear cell and takes its step; scripts/print_kernels.py prints it.

project_and_step: U (B, E K) -> the inputs of the cell by a block-diagonal product with WEIGHT (E, K, inputs, O) -> STATE moved on in place
"""

from __future__ import annotations

import sys

from kernels.moved import moved
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.trace import trace


def source(cell: Cell) -> str:
    """The text of the module. Raises NotLowered if the step cannot be traced."""
    inputs, S = len(cell.pre), len(cell.state)
    arguments = [f"x{p}" for p in range(inputs)] + [f"w{r}" for r in range(len(cell.rec))] + [f"h{s}" for s in range(S)]
    lines = [
        "@triton.jit",
        "def project_and_step(U, WEIGHT, BIAS, REC, STATE, D, K, O, su, PDL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):",
        "    b = tl.program_id(0).to(tl.int64)",
        "    o, e, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(2), tl.arange(0, BK)",
        "    here, d = o < O, e * O + o",
        f"    place = WEIGHT + (e * K + k)[:, None] * ({inputs} * O) + o[None, :]",
        "    both = (k < K)[:, None] & here[None, :]",
        *(f"    weight{p} = tl.load(place + {p} * O, mask=both, other=0.0)" for p in range(inputs)),
        *(f"    w{r} = tl.load(REC + {r} * D + d, mask=here, other=0.0)" for r in range(len(cell.rec))),
        "    if PDL:",
        "        tl.extra.cuda.gdc_launch_dependents()",
        "        tl.extra.cuda.gdc_wait()",
        *(f"    sum{p} = tl.zeros((BK, BN), tl.float32)" for p in range(inputs)),
        "    for first in range(0, K, BK):",
        "        both = (first + k < K)[:, None] & here[None, :]",
        "        if first > 0:",
        *(f"            weight{p} = tl.load(place + first * ({inputs} * O) + {p} * O, mask=both, other=0.0)" for p in range(inputs)),
        "        u = tl.load(U + b * su + e * K + first + k, mask=first + k < K, other=0.0).to(tl.float32)[:, None]",
        *(f"        sum{p} += weight{p}.to(tl.float32) * u" for p in range(inputs)),
        *(f"    x{p} = tl.sum(sum{p}, 0) + tl.load(BIAS + {p} * D + d, mask=here, other=0.0).to(tl.float32)" for p in range(inputs)),
        *(f"    h{s} = tl.load(STATE + (b * {S} + {s}) * D + d, mask=here, other=0.0)" for s in range(S)),
        f"    {', '.join(f'y{s}' for s in range(S))} = step({', '.join(arguments)})",
        *(f"    tl.store(STATE + (b * {S} + {s}) * D + d, y{s}, mask=here)" for s in range(S)),
    ]
    traced = trace(cell)
    step = function("step", traced.arguments, traced.new, "h0", legend=traced.legend)
    header = f'"""The decoding step of the cell {cell.name}, written by kernels/decode_step/cell.py."""\nimport triton\nimport triton.language as tl\n'
    return "\n\n".join([header, functions(step, short="") + "\n", step, "\n".join(lines) + "\n"])


if __name__ == "__main__":
    sys.exit(moved("scripts.print_kernels CELL decode"))
