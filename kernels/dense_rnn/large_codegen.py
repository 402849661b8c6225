"""Puts the Triton source of all kernels of a cell with large dense heads together (large_source.py and large_backward_source.py write them)."""

from __future__ import annotations

from kernels.dense_rnn import chain_source, large_backward_source, large_held_source, large_source
from kernels.dense_rnn import source as narrow
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.products import trace_dense


def source(cell: Cell, short: str, maths: str, pieces: int = 0) -> str:
    """All kernels of a cell with large heads. Arguments as of kernels/dense_rnn/codegen.py. pieces: tiles of a program whose matrices stay on chip, if
    there are to be kernels for that. Raises NotLowered."""
    dense = trace_dense(cell)
    w = narrow.Writer(dense)
    large_source.walk(w)
    large_backward_source.walk_back(w)
    if pieces:
        large_held_source.walk(w, pieces)
        large_held_source.walk_back(w, pieces)
    for back in (False, True):
        chain_source.correct(w, back, joins=False)
        chain_source.certify(w, back, joins=False)
    made = "\n\n".join([*narrow.parts(dense, short == "bfloat16"), *(large_held_source.functions_back(dense) if pieces else [])])
    header = f'"""Kernels of the cell {cell.name} with large heads, written by kernels/dense_rnn/large_codegen.py."""\n'
    header += "import triton\nimport triton.language as tl\n"
    helpers = large_source.HELPERS + (large_held_source.HELPERS if pieces else "")
    return "\n\n".join([header, functions(made, short, maths), helpers.strip("\n"), made, "\n".join(w.lines)]) + "\n"
