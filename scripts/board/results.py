"""Cells of the board and their results: one JSON a cell, a log of every attempt, and intervals on differences of equal seeds."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import finite, write_bytes, write_json
from training.errors import UserError

# 97.5 % quantiles of Student's t by degrees of freedom
T975 = (
    *(math.inf, 12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
)


OUTRUN = "outrun"  # how a try at a rate ended that another rate was ahead of (scripts/board/rates.py)


@dataclass(frozen=True)
class Cell:
    """One run. rival: of a try at a rate, the finished one that ends it where it is ahead."""

    stage: str
    name: str
    row: str
    settings: dict[str, Any]
    rival: Result | None = None

    @property
    def alone(self) -> bool:
        """Whether nothing else may use the device meanwhile."""
        return self.stage in ("speed", "speedrun")

    def of_text(self) -> bool:
        """Whether it is a language model's training, not a probe or a timing."""
        return self.stage not in ("speed", "probe")


@dataclass(frozen=True)
class Result:
    """What became of a cell: its file's content."""

    name: str
    content: dict[str, Any]

    def of(self, settings: dict[str, Any]) -> bool:
        """Whether it is the result of these settings."""
        return bool(self.content.get("settings") == json.loads(json.dumps(settings)))

    @property
    def diverged(self) -> bool:
        return self.content.get("ended") == "diverged"

    @property
    def bits_per_byte(self) -> float | None:
        value = ((self.content.get("measured") or {}).get("held_out") or {}).get("bits_per_byte")
        return None if value is None else float(value)


def every(out: Path, page: Path) -> list[Result]:
    """Every finished cell: those that the page keeps (`gather`), then those under `out`; of equal name and version of the protocol the last one."""
    results = [(content["name"], content["settings"]["protocol"], content) for content in _parsed(page / "cells.jsonl")]
    for path in sorted((out / "cells").glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what is no result is run again
            content = json.loads(path.read_text())
            results.append((content["name"], content["settings"]["protocol"], content))
    return list({(name, protocol): Result(name, content) for name, protocol, content in results}.values())


def read(out: Path, page: Path) -> dict[str, Result]:
    """Finished cells by name, each of the newest version of the protocol that it was run under."""
    return {result.name: result for result in sorted(every(out, page), key=lambda r: r.content["settings"]["protocol"])}


def gather(out: Path, page: Path) -> list[Result]:
    """Takes the cells and attempts of `out` into the page's files, a line each, so that they outlive `out`; all of the page's cells."""
    found = sorted(every(out, page), key=lambda r: (r.content["settings"]["protocol"], r.name))
    if found:
        write_bytes(page / "cells.jsonl", "".join(json.dumps(finite(r.content), default=str) + "\n" for r in found).encode())
    known = _lines(page / "attempts.jsonl")
    logs = [folder / "attempts.jsonl" for folder in (out, out / "again")]
    there = [(str(entry["at"]), line) for log in logs for entry, line in zip(_parsed(log), _lines(log))]
    if new := [line for _, line in sorted((entry for entry in there if entry[1] not in set(known)), key=lambda entry: entry[0])]:
        write_bytes(page / "attempts.jsonl", "".join(line + "\n" for line in [*known, *new]).encode())
    return found


def gather_again(out: Path, page: Path, every: list[Result]) -> list[dict[str, Any]]:
    """Takes what was run a second time under OUT/again into PAGE/again.jsonl, each compared with its first run; all of them."""
    first = {(r.name, r.content["settings"]["protocol"]): r.content for r in every}
    runs = {(run["name"], run["protocol"], run["stops"]): run for run in _parsed(page / "again.jsonl")}
    for path in sorted((out / "again" / "cells").glob("*.json")):
        second = json.loads(path.read_text())
        key = (second["name"], second["settings"]["protocol"])
        if key in first and first[key]["settings"] == second["settings"]:
            differ = [what for what in ("weights_sha256", "curve", "measured") if first[key].get(what) != second.get(what)]
            stops = {"stops_before": first[key].get("stops"), "stops": second.get("stops")}
            code = [run["environment"].get("code") for run in (first[key], second)]
            about = {
                "differ": differ,
                "code": code,
                "weights_sha256": second.get("weights_sha256"),
                "device": second["environment"].get("device"),
            }
            runs[(*key, second.get("stops"))] = {"name": key[0], "protocol": key[1], **stops, **about}
    if runs:
        write_bytes(page / "again.jsonl", "".join(json.dumps(run) + "\n" for run in runs.values()).encode())
    return list(runs.values())


def gather_passkey(out: Path, page: Path) -> dict[str, Any]:
    """Takes the passkey scores of evaluated cells under OUT/evals into PAGE/passkey.json; all of them, by cell."""
    made: dict[str, Any] = {}
    for path in sorted((out / "evals").glob("*/items/passkey-*.json"), key=lambda path: int(path.stem.split("-")[1])):
        item = json.loads(path.read_text())
        if item.get("status") == "done":
            about = {"device": item["environment"]["device"], "precision": item["model"]["precision"], "lengths": []}
            result = {key: item["result"][key] for key in ("length", "accuracy", "low", "high", "n")}
            made.setdefault(path.parents[1].name, about)["lengths"].append(result)
    return _kept(page / "passkey.json", made)


def gather_loaded(out: Path, page: Path) -> dict[str, Any]:
    """Takes what was read off exported folders when transformers had loaded them (OUT/loads) into PAGE/loaded.json; all of it, by cell."""
    return _kept(page / "loaded.json", {path.stem: json.loads(path.read_text()) for path in sorted((out / "loads").glob("*.json"))})


def _kept(path: Path, made: dict[str, Any]) -> dict[str, Any]:
    """What the page has by cell, and what was made since, which is kept with it."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | made
    if content:
        write_json(path, content)
    return content


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError:
        return []


def _parsed(path: Path) -> list[dict[str, Any]]:
    """The file's lines. Raises UserError for one that is cut off."""
    made = []
    for number, line in enumerate(_lines(path), 1):
        try:
            made.append(json.loads(line))
        except ValueError:
            raise UserError(f"Line {number} of {path} is cut off or no JSON; take it out, or bring the file back as it was.") from None
    return made


def keep(out: Path, cell: Cell, content: dict[str, Any]) -> None:
    """Writes a cell's result."""
    write_json(
        out / "cells" / f"{cell.name}.json", {"name": cell.name, "stage": cell.stage, "row": cell.row, **content, "settings": cell.settings}
    )


def attempt(out: Path, cell: str, event: str, **about: Any) -> None:
    """Adds a line to the log of attempts, which nothing is ever taken out of."""
    out.mkdir(parents=True, exist_ok=True)
    line = {"at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "cell": cell, "event": event, **about}
    if out.name == "again":
        line["again"] = True
    with (out / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def attempts(folder: Path) -> list[dict[str, Any]]:
    """The log, in order."""
    return _parsed(folder / "attempts.jsonl")


def final_loss(result: Result | None, settings: dict[str, Any]) -> float | None:
    """Held-out bits per byte of the cell with these settings; infinite where it diverged or was outrun, None where it is not done."""
    if result is None or not result.of(settings):
        return None
    value = result.bits_per_byte
    return math.inf if result.diverged or value is None or not math.isfinite(value) else value


def ratio_of_speed(results: dict[str, Result], one: Cell, other: Cell) -> float | None:
    """Training tokens/s of one row over those of another, to two digits; None where either was not measured."""
    rates = []
    for cell in (one, other):
        result = results.get(cell.name)
        if result is None or not result.of(cell.settings) or "tokens_per_s" not in result.content:
            return None
        rates.append(result.content["tokens_per_s"])
    return round(rates[0] / rates[1], 2)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % t-interval. n: of values; with one there is no interval (infinite)."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def seeds_for(self, width: float) -> int:
        """How many values of this spread have an interval of that width; of an infinite spread as many as there are."""
        spread, n = self.half * math.sqrt(self.n) / T975[self.n - 1], self.n
        while math.isfinite(spread) and 2 * (T975[n - 1] if n <= len(T975) else 2.0) * spread / math.sqrt(n) > width:
            n += 1
        return n

    def decides(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def number(value: float | None, form: str) -> str:
    """For a table: '' for what is not known or not finite."""
    return "" if value is None or not math.isfinite(value) else format(value, form)


def interval(values: Iterable[float]) -> Interval | None:
    """Of the mean of the values; None of nothing. Raises ValueError for more than the table of quantiles has."""
    values = list(values)
    n = len(values)
    if not n:
        return None
    if n > len(T975):
        raise ValueError(f"The table of quantiles reaches {len(T975)} values, not {n}.")
    mean = statistics.fmean(values)
    if n == 1 or not all(map(math.isfinite, values)):
        return Interval(mean, math.inf, n)
    return Interval(mean, T975[n - 1] * statistics.stdev(values) / math.sqrt(n), n)


def difference(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """Interval of one minus other over the seeds that both have."""
    return interval(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()))


def unpaired(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """Interval of one minus other over all seeds of either (Welch's), for rows whose equal seeds are no nearer than others; its quantile is that of the
    whole degrees of freedom below. n: of the fewer seeds. None where a side has fewer than two."""
    sides = [list(values.values()) for values in (one, other)]
    if min(map(len, sides)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in sides]
    spread = sum(parts)
    freedom = spread**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, sides)) if spread > 0 else 1.0
    quantile = T975[min(int(freedom), len(T975) - 1)]
    means = [statistics.fmean(values) for values in sides]
    return Interval(means[0] - means[1], quantile * math.sqrt(spread), min(map(len, sides)))


def seeds_each(one: dict[int, float], other: dict[int, float], width: float) -> int:
    """How many seeds of each of two rows, of the spreads that theirs have, make the interval of `unpaired` so narrow."""
    spread, n = sum(statistics.variance(values.values()) for values in (one, other)), 2
    while 2 * T975[min(n - 1, len(T975) - 1)] * math.sqrt(spread / n) > width:
        n += 1
    return n
