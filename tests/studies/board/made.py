"""What tests of the board run and make up: a cell to its end, and results without a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from scripts.board import work
from scripts.board.results import Cell, Result


def run(cell: Cell, values: dict[str, Any], turns: float = math.inf) -> dict[str, Any] | None:
    """The cell's result, or None where it is left after so many turns, as by a kill."""
    training = work.train(cell, values, torch.device("cpu"))
    while turns > 0:
        try:
            next(training)
        except StopIteration as end:
            return end.value
        turns -= 1
    return None


def results_of(cells: list[Cell], loss: Callable[[Cell], float]) -> dict[str, Result]:
    """Results of cells as if they had these bits per byte; diverged where that is infinite."""
    made = {}
    for cell in cells:
        bits = loss(cell)
        content = {"settings": json.loads(json.dumps(cell.settings)), "stage": cell.stage, "row": cell.row, "name": cell.name}
        content |= {
            "ended": "tokens" if math.isfinite(bits) else "diverged",
            "measured": {"held_out": {"bits_per_byte": bits}},
            "tokens_per_s": 1e5,
        }
        made[cell.name] = Result(cell.name, content)
    return made
