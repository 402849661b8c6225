"""Recurrent cells, one file each: a step function whose annotations say what its arguments are (see kernels/parallel_rnn/cell.py)."""

from __future__ import annotations

import importlib
import keyword
import math
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from data.errors import UserError
from kernels.parallel_rnn.cell import Cell


def available() -> list[str]:
    """Names of the cells found on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def diagonal() -> list[str]:
    """Names of the cells whose step works channel by channel: those without a matrix over a head."""
    return [name for name in available() if not load_cell(name).mat]


def cell_module(name: str) -> ModuleType:
    """The module models/cells/<name>.py. Raises UserError naming the cells there are, or saying why the file cannot be read."""
    if name not in available():
        raise UserError(f"there is no cell {name!r}; models/cells/ holds {', '.join(available())}.")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(
            f"the cell {name!r} cannot be used under this name; rename models/cells/{name}.py to letters, digits and underscores."
        )
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except SyntaxError as reason:
        raise UserError(f"models/cells/{name}.py is not Python: {reason.msg} in line {reason.lineno}.") from None
    except Exception as reason:  # a user's file may raise anything
        raise UserError(
            f"models/cells/{name}.py cannot be imported: {type(reason).__name__}: {(str(reason).splitlines() or [''])[0].rstrip('.')}."
        ) from None


def load_cell(name: str) -> Cell:
    """The Cell of models/cells/<name>.py. Raises UserError for an unknown name and for a file without a step that can be run."""
    module = cell_module(name)
    if not hasattr(module, "step"):
        raise UserError(f"models/cells/{name}.py has no function `step`; define step(...) with arguments annotated Pre, Rec, Mat or State.")
    try:
        cell = Cell.from_step(module.step, name)
    except ValueError as error:  # its signature is not that of a step
        raise UserError(str(error)) from error
    bias_init(name)
    return cell


def bias_init(name: str, changed: Mapping[str, Any] | None = None) -> dict[str, tuple[float, float]]:
    """BIAS_INIT of models/cells/<name>.py: initial biases of input projections, as (lowest, highest over the channels). changed: of some of them a
    number or pair instead. Raises UserError."""
    module = cell_module(name)
    pre, file = Cell.from_step(module.step, name).pre, f"models/cells/{name}.py: BIAS_INIT"
    declared = _ranges(getattr(module, "BIAS_INIT", {}), pre, file)
    return {**declared, **_ranges(dict(changed or {}), pre, f"bias_init of the cell {name}")}


def _ranges(declared: Any, pre: Sequence[str], where: str) -> dict[str, tuple[float, float]]:
    """Numbers and pairs by Pre argument, as pairs."""
    if not isinstance(declared, dict):
        raise UserError(f"{where} must be a dict of numbers or pairs by Pre argument, not a {type(declared).__name__}.")
    ranges = {}
    for argument, value in declared.items():
        pair = value if isinstance(value, (tuple, list)) else (value, value)
        if argument not in pre:
            raise UserError(f"{where} names {argument!r}, which is no Pre argument of its step; these are {', '.join(pre)}.")
        if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, (int, float)) or not math.isfinite(v) for v in pair):
            raise UserError(f"{where}[{argument!r}] must be a finite number or a pair of them, not {value!r}.")
        ranges[argument] = (float(pair[0]), float(pair[1]))
    return ranges
