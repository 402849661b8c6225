"""Writes the Triton source of a cell's kernels. scripts/print_kernels.py prints it.

All kernels are channel-last; a program owns BD neighbouring channels of one time slice and walks it step by step with the states in fp32
registers (kernels/parallel_rnn/writer.py has the names and how loads run ahead).

    walk           all slices at once, each from zero (the first from h0): states, marks (fp32 states after every MARK steps) and ends
    mend           each slice again from where the one before it ends, or from Newton's step on all starts, until it meets what is there
    finish         the certificate; a tile that has not converged is walked in order from the first slice that does not fit
    gradient       the reversed walk: gradients of pre, h0, partial sums of rec, each slice as if no later one had a gradient
    mend_gradient  what later slices pass down, exactly (adjoints are linear), as far down as it counts; all in order where a product overflowed
    transfer       products of Jacobians and adjoints of starts at known states (sequences over ranks)
    shoot          of small problems all forward passes in one: all slices of a tile of channels in one program
    decode         one step
"""

from __future__ import annotations

import sys

from kernels.moved import moved
from kernels.parallel_rnn import backward_source, forward_source, shoot_source
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.trace import trace
from kernels.parallel_rnn.writer import HELPERS

AHEAD, AHEAD_BACK, AHEAD_SHOOT = 8, 4, 4  # steps of a group, the unit in which loads run ahead
KERNELS = ("walk", "mend", "finish", "gradient", "mend_gradient", "transfer", "shoot", "decode")


def source(cell: Cell, ahead: int = AHEAD, back: int = AHEAD_BACK, maths: str = "ptx", short: str = "bfloat16") -> str:
    """All kernels of a cell. maths: "ptx" (NVIDIA's approximate exp2 and reciprocal, 2 and 1 units in the last place) or "portable".
    short: the type of inputs in 16 bits, for which functions are as good as their rounding asks for, and the factors of exponents moved off the chain of
    steps (it rounds worse where a gate's terms cancel).
    Raises NotLowered if the step cannot be traced."""
    traced = trace(cell)
    arguments, like, fixed = traced.arguments, "h0", traced.fixed if short else ()
    entries = [entry for row in traced.jacobian for entry in row]
    curves = [entry for row in traced.second for column in row for entry in column]
    header = (
        f'"""Kernels of the cell {cell.name}, written by kernels/parallel_rnn/codegen.py."""\nimport triton\nimport triton.language as tl\n'
    )
    steps = [
        function("step", arguments, traced.new, like, fixed=fixed, legend=traced.legend),
        function("jacobian", arguments, entries, like),
        function("step_and_jacobian", arguments, [*traced.new, *entries], like, fixed=fixed),
        function("step_and_curves", arguments, [*traced.new, *entries, *curves], like, fixed=fixed) if curves else "",
        function("step_vjp", [*arguments, *traced.cotangents], [*traced.d_pre, *traced.d_rec, *traced.d_state], like),
    ]
    parts = [
        header,
        functions("".join(steps), short, maths) + "\n",
        HELPERS.strip("\n") + "\n",
        backward_source.PASSED.strip("\n") + "\n",
        *(step for step in steps if step),
        forward_source.walk(traced, ahead),
        forward_source.mend(traced, ahead),
        forward_source.finish(traced, ahead),
        backward_source.gradient(traced, back),
        backward_source.mend_gradient(traced, back),
        backward_source.transfer(traced, back),
        shoot_source.compose(traced),
        shoot_source.shoot(traced, min(ahead, AHEAD_SHOOT)),
        forward_source.decode(traced),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(moved("scripts.print_kernels"))
