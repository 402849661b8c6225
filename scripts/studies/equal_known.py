"""Cells of scripts/studies/equal.py in the tables of earlier calls, on whatever machine: of each task, mixer and seed the one that came furthest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from scripts.studies.equal_cells import MIXERS, TASKS
from training.errors import UserError

Cell = dict[str, Any]
RENAMED = {"A5-long": "A5"}  # what was a task of its own is seed 0 of A5 with more steps


def tables(value: Any) -> Iterator[tuple[list[Cell], str]]:
    """Every list of cells inside a record, and the device that they ran on."""
    if isinstance(value, dict):
        if isinstance(value.get("cells"), list):
            yield value["cells"], value.get("environment", {}).get("device", "")
        for part in value.values():
            yield from tables(part)


@lru_cache(maxsize=4)
def recorded(folder: Path) -> list[Cell]:
    """All cells of this study in the folder's JSON files, each with its file and device; those of other studies have other fields. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"known is {str(folder)!r}, which is no folder; name one with tables of earlier calls, or leave it out.")
    cells = []
    for path in sorted(folder.glob("*.json")):
        for some, device in tables(json.loads(path.read_text())):
            for cell in some:
                task = RENAMED.get(cell.get("task", ""), cell.get("task"))
                if task in TASKS and cell.get("mixer") in MIXERS and "layer" in cell.get("settings", {}) and "ended" in cell:
                    cells.append({**cell, "task": task, "file": path.name, "device": cell.get("device", device)})
    return cells


def furthest(cells: Iterable[Cell]) -> dict[tuple[str, str, int], Cell]:
    """By task, mixer and seed: of several a cell that ended over one that the clock cut, then the one of most steps, then the last."""
    ranked = sorted(cells, key=lambda cell: (cell["ended"] != "time", cell["step"]))  # of equals the last stays last
    return {(cell["task"], cell["mixer"], cell["seed"]): cell for cell in ranked}
