"""Which cell a process runs next: any number of processes, of one machine or several, share a folder and no cell is run twice.

A cell belongs to who holds the lock of its file in OUT/taken; the kernel lets that go when the process ends, however it does. Each time a process is
free it reads what is finished and asks the plan again, so what follows from a result is begun at once by whoever is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import socket
import statistics
import time
from pathlib import Path
from typing import IO, Any

from data.fields import nearest
from scripts.board.order import READ0
from scripts.board.plan import Plan, check
from scripts.board.results import Cell, Result, read
from training.errors import UserError

BETWEEN = 0.02  # by which a training takes longer than its tokens at the row's best speed
ABOUT, READING, COMPILING = 2.0, 3.0, 20.0  # seconds of a cell beside its training: always, where more is read off it, of a row's first one


def make_plan(values: dict[str, Any]) -> Plan:
    """The plan of the size and shards. Raises UserError."""
    check(values["size"], values["data"])
    speedrun = (values["speedrun_tokens"], values["speedrun_lr"])
    return Plan(values["size"], values["data"], values["rows"], values["precision"], values["seeds"], speedrun, values["rates"])


def chosen_cells(values: dict[str, Any], plan: Plan, results: dict[str, Result]) -> list[Cell]:
    """The cells asked for, of those known so far. Raises UserError for a name that the plan does not have."""
    stages = values["stages"]
    named = {name.split(".")[0].split("_of_")[0] for name in values["only"]}
    if named and named <= set(stages):  # the plan of other stages may ask for more text than is at hand
        stages = [stage for stage in stages if stage in named]
    cells = plan.cells(results, stages)
    if values["only"]:
        names = [cell.name for cell in cells]
        unknown = [name for name in values["only"] if name not in names]
        if unknown:
            raise UserError([f"only: {nearest(name, names)} (the plan has no cell {name!r} yet)" for name in unknown])
        cells = [cell for cell in cells if cell.name in values["only"]]
    return cells


def pending(values: dict[str, Any], plan: Plan) -> tuple[list[Cell], dict[str, Result]]:
    """(the cells asked for that are not finished, what is finished)."""
    results = read(Path(values["out"]), Path(values["page"]))
    cells = chosen_cells(values, plan, results)
    return [cell for cell in cells if not (cell.name in results and results[cell.name].of(cell.settings))], results


def failed(values: dict[str, Any]) -> list[str]:
    """The cells that failed in the run that ended last."""
    return sorted(path.stem for path in (Path(values["out"]) / "taken").glob("*.failed"))


class Queue:
    """Gives out cells to process `number` on device `place`. fixed: these and no others, instead of what the plan has."""

    def __init__(self, values: dict[str, Any], place: str, fixed: list[Cell] | None = None) -> None:
        self.values, self.place = values, place
        self.folder = Path(values["out"]) / "taken"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.plan = None if fixed is not None else make_plan(values)
        self.fixed = fixed or []
        self.held: dict[str, list[IO[str]]] = {}

    def take(self) -> Cell | None:
        """The first cell that is free, locked; None where there is nothing to do, or no time. Waits while others run what might decide more cells."""
        while True:
            cells, results = pending(self.values, self.plan) if self.plan else (self.fixed, {})
            failed = {cell.name for cell in cells if (self.folder / f"{cell.name}.failed").exists()}
            troubled = {cell.row for cell in cells if cell.name in failed}
            others = False
            first = self.values["first"]  # what failed once may well fail again
            for cell in sorted(
                cells, key=lambda cell: (cell.row in troubled, first.index(cell.stage) if cell.stage in first else len(first))
            ):
                if cell.name in failed or cell.name in self.held or not self._time_for(cell, results):
                    continue
                if self._lock(cell):
                    if self._still_open(cell):
                        if self.fixed:
                            self.fixed = [other for other in self.fixed if other is not cell]
                        return cell
                    self.release(cell)
                else:
                    others = True
            until = self.values["until"]
            if self.held or not others or until and time.time() > until - self.values["least"]:
                return None
            time.sleep(0.3)

    def release(self, cell: Cell, failed: bool = False) -> None:
        """Gives a cell back. failed: nobody takes it again in this run."""
        if failed:
            (self.folder / f"{cell.name}.failed").touch()
        for file in self.held.pop(cell.name, []):
            file.close()

    def forgive(self) -> None:
        """What failed in an earlier run is tried again."""
        for path in self.folder.glob("*.failed"):
            path.unlink(missing_ok=True)

    def _time_for(self, cell: Cell, results: dict[str, Result]) -> bool:
        """Whether enough time is left: to begin, or, with whole=true, for as long as the cell is expected to take."""
        if not self.values["until"]:
            return True
        least = self.values["least"]
        if self.values["whole"] and cell.stage != "speed":
            # Cells together are no slower than one after the other, and the last one has the device alone.
            least = max(least, expected_seconds(cell, results, self.values.get("beside", 1)) + self.values["spare"])
        return bool(time.time() < self.values["until"] - least)

    def _lock(self, cell: Cell) -> bool:
        """Takes the cell, and the device: shared, or whole where the cell must be alone there."""
        if self.held and cell.alone:
            return False
        files: list[IO[str]] = []
        device = f"device.{socket.gethostname()}.{self.place}"
        for name, kind in ((cell.name, fcntl.LOCK_EX), (device, fcntl.LOCK_EX if cell.alone else fcntl.LOCK_SH)):
            files.append((self.folder / f"{name}.lock").open("a+"))
            try:
                fcntl.flock(files[-1], kind | fcntl.LOCK_NB)
            except BlockingIOError:
                for file in files:
                    file.close()
                return False
            except OSError:  # a file system without locks gives it to everybody
                pass
        self.held[cell.name] = files
        return True

    def _still_open(self, cell: Cell) -> bool:
        """Whether nobody finished the cell between the reading of the results and the lock."""
        with contextlib.suppress(OSError, ValueError):
            content = json.loads((Path(self.values["out"]) / "cells" / f"{cell.name}.json").read_text())
            return not Result(cell.name, content).of(cell.settings)
        return True


def expected_seconds(cell: Cell, results: dict[str, Result], beside: int = 1) -> float:
    """Of a text: its tokens at the row's best speed so far (of a row that has none, the slowest of all, and a while to compile), what is about a
    training, and what is read off it; of a row that never had a device alone, the median of what all on it made together. Of a task: the median of
    others. beside: cells that share the device."""
    if not cell.of_text():
        return statistics.median(
            [r.content["took"] for r in results.values() if r.content["stage"] == cell.stage and "took" in r.content] or [0.0]
        )
    alone: dict[str, list[float]] = {}
    together: dict[str, list[float]] = {}
    for result in results.values():
        speed, sharing = result.content.get("tokens_per_s"), result.content.get("beside") or 1
        if speed and result.content["stage"] not in ("probe", "speed"):
            (alone if sharing == 1 else together).setdefault(result.content["row"], []).append(speed * sharing)
    best = {row: statistics.median(speeds) for row, speeds in together.items()} | {row: max(speeds) for row, speeds in alone.items()}
    if not best:
        return 0.0
    settings = cell.settings
    tokens, speed = settings["steps"] * settings["rows"] * settings["T"], best.get(cell.row, min(best.values()))
    reads = READING if settings["seed"] == READ0 or cell.stage == "leaders" else 0.0
    return (1 + BETWEEN) * tokens * beside / speed + ABOUT + reads + (COMPILING if cell.row not in best else 0.0)
