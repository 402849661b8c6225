"""Recurrent cells, one file each: a step function whose annotations say what its arguments are (see kernels/parallel_rnn/cell.py)."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from kernels.parallel_rnn.cell import Cell


def available() -> list[str]:
    """Names of the cells found on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def cell_module(name: str) -> ModuleType:
    """The module models/cells/<name>.py. Raises ValueError naming the cells there are."""
    if name not in available():
        raise ValueError(f"There is no cell {name!r}; models/cells/ holds {', '.join(available())}.")
    return importlib.import_module(f"{__name__}.{name}")


def load_cell(name: str) -> Cell:
    """The Cell of models/cells/<name>.py. Raises ValueError for an unknown name."""
    return Cell.from_step(cell_module(name).step, name)
