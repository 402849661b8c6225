"""Table and plot of scripts/studies/equal.py, from its cells."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report.figures import png, pyplot
from scripts.studies.equal_cells import MIXERS, TASKS
from training.errors import UserError

Cell = dict[str, Any]
MARK = "<!-- table of scripts/studies/equal.py -->"


def at(cell: Cell, length: int) -> float:
    return next(row["accuracy"] for row in cell["lengths"] if row["length"] == length)


def names(cells: Sequence[Cell], key: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that there are."""
    there = {cell[key] for cell in cells}
    return [name for name in known if name in there]


def median(cells: Sequence[Cell]) -> Cell:
    """The cell of the middle seed by accuracy at the longest and the shortest length, for the table and the plot alike."""
    order = sorted(cells, key=lambda cell: cell["lengths"][-1]["accuracy"] + cell["lengths"][0]["accuracy"])
    return order[len(order) // 2]


def percent(accuracy: float) -> str:
    """Whole per cent, but of nearly all answers a tenth: 100 is kept for those that are."""
    return f"{100 * accuracy:.1f}" if 0.985 <= accuracy < 0.9995 else f"{100 * accuracy:.0f}"


def summary(cells: Sequence[Cell], T: int, lengths: Sequence[int]) -> str:
    """One entry of the table: how many seeds were solved in how many steps, the median seed by length, and what was not to its end."""
    reach = ", ".join(percent(at(median(cells), T * m)) for m in lengths)
    cut = [cell["step"] for cell in cells if cell["ended"] == "time"]
    if len(cut) == len(cells):
        return f"cut at {min(cut):,} to {max(cut):,}; {reach}" if min(cut) < max(cut) else f"cut at {cut[0]:,}; {reach}"
    solved = sorted(cell["solved"] for cell in cells if cell["ended"] == "solved")
    text = f"**{len(solved)}/{len(cells)}** in {statistics.median_high(solved):,}; " if solved else f"0/{len(cells)}; "
    steps = [cell["step"] for cell in cells if cell["ended"] == "steps"]
    text += reach + (f"; {max(steps):,} steps" if steps else "")
    text += f"; {len(cut)} cut at {max(cut):,}" if cut else ""
    diverged = sum(cell["ended"] == "diverged" for cell in cells)
    return text + (f"; diverged: {diverged}" if diverged else "")


def where(cells: Sequence[Cell]) -> str:
    """A mark where a CPU trained some of them."""
    return " °" if any(cell.get("device") == "cpu" for cell in cells) else ""


def table(cells: Sequence[Cell], T: int, lengths: Sequence[int]) -> str:
    """Markdown, a row a mixer and a column a task."""
    tasks, mixers = names(cells, "task", TASKS), names(cells, "mixer", MIXERS)
    said = (
        f"Seeds that were solved, of those trained, and the median of their steps; accuracy in per cent of the median seed at "
        f"{', '.join(str(T * m) for m in lengths)} tokens; the steps of seeds that took all of theirs unsolved; cut: by the clock, which "
        "says nothing of what the mixer can do; °: some or all on a CPU."
    )
    lines = [
        *textwrap.wrap(said, 118),
        "",
        "| mixer | parameters | " + " | ".join(tasks) + " |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for mixer in mixers:
        row, mine = [], [cell for cell in cells if cell["mixer"] == mixer]
        for task in tasks:
            chosen = [cell for cell in mine if cell["task"] == task]
            row.append(summary(chosen, T, lengths) + where(chosen) if chosen else "")
        sizes = [f"{count:,}" for count in sorted({cell["parameters"] for cell in mine})]
        lines.append(f"| {mixer} | {' to '.join(dict.fromkeys((sizes[0], sizes[-1])))} | " + " | ".join(row) + " |")
    chance = [100 * max(cell["lengths"][0]["chance"] for cell in cells if cell["task"] == task) for task in tasks]
    return "\n".join([*lines, "| chance | | " + " | ".join(f"{c:.0f}" for c in chance) + " |"])


def into_page(page: Path, text: str) -> None:
    """Writes `text` between the page's two marks. Raises UserError if they are not there."""
    parts = page.read_text().split(MARK) if page.exists() else []
    if len(parts) != 3:
        raise UserError(f"{page} has not two lines {MARK!r}, between which the table goes; add them, or leave page out.")
    write_bytes(page, MARK.join([parts[0], f"\n{text}\n", parts[2]]).encode())


def plot(cells: Sequence[Cell], T: int, path: Path) -> str:
    """Accuracy by length, a panel a task and a line a mixer (median seed). Returns what was done, for people."""
    plt = pyplot()
    if plt is None or not cells:
        return "There is no plot: matplotlib is not installed, or there is no cell."
    tasks, mixers = names(cells, "task", TASKS), names(cells, "mixer", MIXERS)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.9 * rows + 0.7), squeeze=False, sharey=True)
    colours = dict(zip(mixers, plt.get_cmap("tab20").colors))
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks):
        for mixer in mixers:
            chosen = [c for c in cells if (c["task"], c["mixer"]) == (task, mixer)]
            if chosen:
                middle, line = median(chosen), "--" if all(c["ended"] == "time" for c in chosen) else "-"
                points = [(row["length"], 100 * row["accuracy"]) for row in middle["lengths"]]
                axis.plot(*zip(*points), line, marker="o", markersize=3.5, linewidth=1.2, alpha=0.85, label=mixer, color=colours[mixer])
        axis.axhline(100 * max(c["lengths"][0]["chance"] for c in cells if c["task"] == task), color="grey", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda length, _: f"{length:g}")
        axis.set_xlabel("tokens")
        axis.set_ylim(0, 103)
        axis.set_title(task, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("right answers, %")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(f"Median of the seeds, trained at length {T}; dotted: chance; dashed: cut by the clock", fontsize=10, wrap=True)
    figure.tight_layout(rect=(0, 0.08, 1, 0.99))
    write_bytes(path, png(plt, figure, dpi=120, bbox_inches=None))
    return f"plot: {path}"
