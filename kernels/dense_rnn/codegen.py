"""Puts the Triton source of all kernels of a cell with dense heads together (source.py and backward_source.py write them).
scripts/print_kernels.py prints it."""

from __future__ import annotations

from kernels.dense_rnn import backward_source, chain_source
from kernels.dense_rnn import source as forward
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.products import trace_dense


def source(cell: Cell, short: str, maths: str, halves: bool = False, narrow: bool = False) -> str:
    """All kernels of a cell. short: the type of inputs in 16 bits, or ''. maths: of kernels/parallel_rnn/functions.py. halves: products are not rounded to
    16 bits, nor is the tangent of bf16's accuracy. narrow: of programs of eight rows. Raises NotLowered."""
    dense = trace_dense(cell)
    w = (forward.Narrow if narrow else forward.Writer)(dense)
    forward.walk(w)
    forward.finish(w)
    for back in (False, True):
        chain_source.correct(w, back)
        chain_source.certify(w, back)
    backward_source.walk_back(w)
    backward_source.finish_back(w)
    made = "\n\n".join(forward.parts(dense, short == "bfloat16" and not halves, small=True))
    header = (
        f'"""Kernels of the cell {cell.name}, written by kernels/dense_rnn/codegen.py."""\nimport triton\nimport triton.language as tl\n'
    )
    helpers = (forward.HELPERS + forward.PUT[maths]).strip("\n")
    return "\n\n".join([header, functions(made, short, maths), helpers, made, "\n".join(w.lines)]) + "\n"
