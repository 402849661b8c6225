"""Prints the Triton source that is written for a cell (models/cells/NAME.py).

    python -m scripts.print_kernels paragru            # the kernels of the parallel solve (kernels/parallel_rnn/codegen.py)
    python -m scripts.print_kernels dense_lstm         # of a cell with matrices, those of heads of up to 64 channels (kernels/dense_rnn/codegen.py)
    python -m scripts.print_kernels paragru decode     # the step of decoding (kernels/decode_step/cell.py)

Without a name it is that of paragru.
"""

from __future__ import annotations

import sys

from data.errors import UserError
from data.program import program
from kernels.decode_step import cell as decode_step
from kernels.decode_step import dense_cell
from kernels.dense_rnn import codegen as dense_codegen
from kernels.parallel_rnn import codegen
from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.operations import NotLowered
from models.cells import load_cell

SOURCES = {"solve": codegen.source, "decode": decode_step.source}


def text(cell: Cell, kind: str) -> str:
    """Raises NotLowered."""
    if not cell.mat:
        return SOURCES[kind](cell)
    return dense_codegen.source(cell, "bfloat16", "ptx", narrow=True) if kind == "solve" else dense_cell.source(cell)


def main(words: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, run, words)


def run(words: list[str]) -> None:
    """What the command line asks for. Raises UserError."""
    if len(words) > 2:
        raise UserError(f"Give the name of one cell and {' or '.join(SOURCES)}, not {len(words)} words.")
    name, kind = [*words, *("paragru", "solve")[len(words) :]]
    if kind not in SOURCES:
        raise UserError(f"There are no kernels {kind!r}; choose {' or '.join(SOURCES)}.")
    try:
        print(text(load_cell(name), kind))
    except NotLowered as error:
        raise UserError(f"The cell {name} has no kernels and runs as a loop: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
