"""Trains small models on generated tasks, task by mixer by seed, and draws the table of what they learn and how far it reaches.

    python -m scripts.studies.tracking                                    the main tasks on one GPU (or the CPU) in six minutes
    python -m scripts.studies.tracking tasks=S3,A5,mod-5 minutes=5        other tasks into the same folder; tasks=all mixers=all: all
    python -m scripts.studies.tracking tasks=parity,mqar mixers=paragru,mamba2 seeds=1 minutes=2 workers=8 out=runs/state_tracking
    python -m scripts.studies.tracking tasks=mqar mixers=paragru,paralstm minutes=8     longer: MQAR wants tens of thousands of steps
    python -m scripts.studies.tracking published=true tasks=mqar minutes=180            batch 16, rate 5e-4, 1.9 million steps, as published
    python -m scripts.studies.tracking minutes=0                          only the table and the plot of what is there

Several worker processes share the device, each with several cells on streams of their own, since one such model does not fill it
(scripts/studies/cells.py). Each result is a file in OUT/cells, written when it is known; the same command goes on where it stopped. Needs
torch, numpy and this repository (no launcher, no DeepSpeed, no Hydra).
Cells end when the task is solved (after a short fall of the learning rate), after `steps`, or when their share of the time is used up.
Published settings (arXiv 2510.21450, table 6): one layer, width and state 64, 4 heads, convolution 4, no MLP, length 100, 3000 passes over
10,000 samples with batch 16 and a rate of 5e-4. Here: 40,000 samples, a larger batch and rate, and lengths that rise from an eighth to the whole.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from data.fields import nearest
from data.files import write_bytes, write_json
from evals.report.figures import png, pyplot
from scripts.studies.cells import LENGTHS, MIXERS, TASKS, settings_of, train_cell
from scripts.studies.workers import end_by, end_with_parent
from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS: dict[str, Any] = {
    "out": "runs/state_tracking",
    "tasks": "parity,mqar,1-hop,2-next,2-hop,2-hop-2L,S3,A5,mod-5",  # in order of importance, or all
    "mixers": "paragru,paralstm,mamba2,transformer,torch_gru",  # or all
    "seeds": 3,
    "minutes": 6.0,
    "workers": 0,  # processes, spread over the GPUs; 0: a third of the cores, at most 6 a GPU; one on a CPU
    "streams": 0,  # cells a process trains at a time; 0: 4 on a GPU, one on a CPU
    "steps": 0,  # 0: those of the task
    "batch": 0,  # 0: 64; MQAR takes twice as many
    "length": 100,
    "layers": 1,  # of all but the hybrid and the tasks that say otherwise
    "published": False,  # true: batch, rate, samples and steps of the publication, and no curriculum
    "device": "auto",
    "sequences": 1000,  # scored at each length in the end; up to ten times as many where a sequence asks little
    "longer": False,  # true: what ran out of time is trained once more as well
    "again": False,  # train what is there already once more
}

LEAST_SECONDS = 4.0


def arguments(words: list[str]) -> dict[str, Any]:
    """key=value arguments over DEFAULTS, tasks and mixers as lists. Raises UserError with all problems."""

    def chosen(values: dict[str, Any]) -> list[str]:
        problems = []
        for key, known in (("tasks", TASKS), ("mixers", MIXERS)):
            names = [name.strip() for name in values[key].split(",") if name.strip() not in ("", "all")] or list(known)
            problems += [f"{key}: {nearest(name, list(known))} (there is no {name!r})" for name in names if name not in known]
            values[key] = names
        return problems + place_and_time(values)

    return parse_arguments(words, DEFAULTS, chosen)


def read_cell(out: Path, task: str, mixer: str, seed: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A finished cell of the same settings, or None."""
    try:
        cell = json.loads((out / "cells" / f"{task}.{mixer}.{seed}.json").read_text())
    except (OSError, ValueError):
        return None
    return cell if cell.get("settings") == settings and "error" not in cell else None


def start_cell(
    number: int, values: dict[str, Any], cells: list[tuple[str, str, int]], deadline: float, device: Any
) -> tuple[dict[str, Any], Any] | None:
    """(what the cell is, its training), or None when too little time is left."""
    left, slots = deadline - time.time(), values["workers"] * values["streams"]
    # Others are half through theirs on average; a tenth goes to scoring.
    task, mixer, seed = cells[number]
    weights = [TASKS[other].get("weight", 1) for other, _, _ in cells[number:]]
    share = left * slots * weights[0] / (sum(weights) + slots / 2) * 0.9
    seconds = min(max(share, LEAST_SECONDS), left - 2.0)
    if seconds < LEAST_SECONDS * 0.9:
        return None
    settings = settings_of(task, mixer, values)
    cell = {"task": task, "mixer": mixer, "seed": seed, "settings": settings}
    return cell, train_cell(settings, seed, device, seconds, values["sequences"])


def work(values: dict[str, Any], cells: list[tuple[str, str, int]], taken: Any, deadline: float, device_name: str, visible: str) -> None:
    """One worker: takes cells until none or no time is left, `streams` at a time. `taken` counts those given out; `deadline` is of time.time().
    visible: the one GPU that it sees."""
    import torch

    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; cells are written whole
        end_with_parent()
    if visible:  # before anything here asks for a device
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    torch.set_num_threads(1)
    device = torch.device(device_name)
    running: list[tuple[int, dict[str, Any], Any]] = []
    more = True
    while more or running:
        while more and len(running) < values["streams"]:
            with taken.get_lock():
                number = taken.value
                taken.value += 1
            started = start_cell(number, values, cells, deadline, device) if number < len(cells) else None
            more = started is not None
            if started is not None:
                running.append((number, *started))
        for entry in list(running):
            number, cell, training = entry
            try:
                next(training)
                continue
            except StopIteration as end:
                cell |= end.value
            except Exception as error:  # one cell's failure is its own result; a device that is lost ends the worker
                cell["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                cell["traceback"] = traceback.format_exc()
            running.remove(entry)
            keep(cell, Path(values["out"]), f"[{number + 1}/{len(cells)}]")
            if device.type == "cuda" and "CUDA" in cell.get("error", "") and "OutOfMemory" not in cell["error"]:
                return


def keep(cell: dict[str, Any], out: Path, place: str) -> None:
    """Writes a cell and says what became of it."""
    name = f"{place} {cell['task']:9} {cell['mixer']:11} seed {cell['seed']}"
    write_json(out / "cells" / f"{cell['task']}.{cell['mixer']}.{cell['seed']}.json", cell)
    if "error" in cell:
        print(f"{name}  {cell['error']}", flush=True)
        return
    shown = "  ".join(
        f"{row['length']}: {100 * row['accuracy']:.1f}" if "error" not in row else f"{row['length']}: ?" for row in cell["lengths"]
    )
    print(
        f"{name}  {shown}  ({cell['ended']}, {cell['steps']} steps, {cell['seconds']:.0f} s, {cell['parameters']} parameters)", flush=True
    )


def collect(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every finished cell of these settings, in the table's order."""
    out, cells = Path(values["out"]), []
    for task in values["tasks"]:
        for mixer in values["mixers"]:
            for seed in range(values["seeds"]):
                cell = read_cell(out, task, mixer, seed, settings_of(task, mixer, values))
                if cell is not None:
                    cells.append(cell)
    return cells


def best(cells: list[dict[str, Any]], task: str, mixer: str) -> tuple[dict[str, Any] | None, list[float]]:
    """(the seed with the highest accuracy at the training length, every seed's accuracy)."""
    rows = [c for c in cells if (c["task"], c["mixer"]) == (task, mixer) and c["accuracy"] is not None]
    reach = [max(c["lengths"], key=lambda row: row["length"]).get("accuracy", 0.0) for c in rows]
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["accuracy"], reach[i]))
    return (rows[order[-1]] if rows else None), [c["accuracy"] for c in rows]


def at(cell: dict[str, Any], length: int) -> dict[str, Any]:
    """The row of a cell at `length` tokens, {} where it has none."""
    return next((row for row in cell["lengths"] if row["length"] == length and "error" not in row), {})


def table(cells: list[dict[str, Any]], values: dict[str, Any]) -> str:
    """Markdown: best of the seeds at the training length, the median of the seeds where it differs, and the best one beyond it."""
    T = values["length"]
    beyond = [round(share * T) for share in LENGTHS if share > 1]
    lines = [
        f"Accuracy in per cent over all answers at length {T}, best seed (median of n seeds) and, after the arrow, that seed at lengths "
        f"{', '.join(map(str, beyond))}; m of n seeds that ran out of time before they were solved or took all their steps. Chance is the share of "
        "the commonest answer; parameters are those of the first task.",
        "",
        "| mixer | parameters | " + " | ".join(values["tasks"]) + " |",
        "|---" * (len(values["tasks"]) + 2) + "|",
    ]
    chance = []
    for task in values["tasks"]:
        rows = [at(c, T) for c in cells if c["task"] == task]
        chance.append(f"{100 * max((r.get('chance', 0.0) for r in rows), default=0.0):.0f}" if rows else "")
    for mixer in values["mixers"]:
        row = []
        for task in values["tasks"]:
            top, seeds = best(cells, task, mixer)
            if top is None:
                row.append("")
                continue
            far = [f"{100 * at(top, n)['accuracy']:.1f}" if at(top, n) else "?" for n in beyond]
            late = sum(c["ended"] == "time" for c in cells if (c["task"], c["mixer"]) == (task, mixer))
            text = f"{100 * top['accuracy']:.1f} ({100 * statistics.median(seeds):.1f} of {len(seeds)}) → {', '.join(far)}"
            row.append(text + (f"; ran out of time: {late} of {len(seeds)}" if late else ""))
        count = next((f"{c['parameters']:,}" for t in values["tasks"] for c in cells if (c["task"], c["mixer"]) == (t, mixer)), "")
        lines.append(f"| {mixer} | {count} | " + " | ".join(row) + " |")
    lines.append("| chance | | " + " | ".join(chance) + " |")
    return "\n".join(lines)


def plot(cells: list[dict[str, Any]], values: dict[str, Any], path: Path) -> str:
    """Accuracy by length, a panel a task and a line a mixer (best seed). Returns what was done, for people."""
    plt = pyplot()
    if plt is None:
        return "matplotlib is not installed, so there is no plot; minutes=0 draws it elsewhere from the same folder."
    tasks = [t for t in values["tasks"] if any(c["task"] == t for c in cells)]
    if not tasks:
        return "There is nothing to plot yet."
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.7 * rows + 0.5), squeeze=False, sharey=True)
    colours, marks = dict(zip(MIXERS, plt.get_cmap("tab20").colors)), dict(zip(MIXERS, itertools.cycle("o^sDv<>Px")))
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks):
        for mixer in values["mixers"]:
            top, _ = best(cells, task, mixer)
            if top is None:
                continue
            points = [(row["length"], 100 * row["accuracy"]) for row in top["lengths"] if "error" not in row]
            axis.plot(*zip(*points), marker=marks[mixer], markersize=4.5, alpha=0.8, linewidth=1.3, label=mixer, color=colours[mixer])
        chances = [at(c, values["length"]).get("chance") for c in cells if c["task"] == task]
        axis.axhline(100 * max((c for c in chances if c is not None), default=0.0), color="grey", linewidth=0.8, linestyle=":")
        axis.axvline(values["length"], color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        ticks = sorted({row["length"] for c in cells if c["task"] == task for row in c["lengths"]})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.set_ylim(0, 103)
        axis.set_title(task, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("right answers, %")
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(9, len(handles)), fontsize=8, frameon=False)
    figure.suptitle(f"Best of {values['seeds']} seeds, trained at length {values['length']} (grey line); dotted: chance", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 0.99))
    write_bytes(path, png(plt, figure, dpi=130, bbox_inches=None))
    return f"plot: {path}"


def report(values: dict[str, Any], device: str, seconds: float) -> None:
    """Writes table.json, table.md and the plot from the cells on disk, and prints the table."""
    import torch

    from training.watch.metrics import environment

    cells, out = collect(values), Path(values["out"])
    text = table(cells, values)
    summary = [{key: cell[key] for key in cell if key != "curve"} for cell in cells]
    write_json(
        out / "table.json", {"arguments": values, "seconds": seconds, "environment": environment(torch.device(device)), "cells": summary}
    )
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{len(cells)} cells of {len(values['tasks']) * len(values['mixers']) * values['seeds']}: {out / 'table.json'}")
    try:
        print(plot(cells, values, out / "table.png"))
    except Exception as error:  # the numbers are safe; a plot is not worth a run
        print(f"The plot could not be drawn: {type(error).__name__}: {error}")


def place_and_time(values: dict[str, Any]) -> list[str]:
    """What is wrong with the keys device and minutes of a study."""
    problems = [] if values["device"] in ("auto", "cpu", "cuda") else [f"device is {values['device']!r}; choose auto, cpu or cuda."]
    return problems + (["minutes must be zero or more."] if values["minutes"] < 0 else [])


def visible_gpus(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is to say, for each GPU; [""] on a CPU."""
    import torch

    if device != "cuda":
        return [""]
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(i) for i in range(torch.cuda.device_count())]


def main(words: list[str]) -> None:
    """What the command line asks for. Raises UserError."""
    began = time.time()
    values = arguments(words)
    import torch

    device = values["device"] if values["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=auto.")
    gpus = visible_gpus(device)
    values["batch"] = values["batch"] or 64
    values["workers"] = values["workers"] or (max(1, min(6 * len(gpus), (os.cpu_count() or 1) // 3)) if device == "cuda" else 1)
    values["streams"] = values["streams"] or (4 if device == "cuda" else 1)
    out = Path(values["out"])
    (out / "cells").mkdir(parents=True, exist_ok=True)
    cells = [(task, mixer, seed) for seed in range(values["seeds"]) for task in values["tasks"] for mixer in values["mixers"]]
    if not values["again"]:
        there = [read_cell(out, t, m, s, settings_of(t, m, values)) for t, m, s in cells]
        cells = [place for place, cell in zip(cells, there) if cell is None or values["longer"] and cell["ended"] == "time"]
    deadline = began + 60 * values["minutes"]
    if cells and values["minutes"] > 0:
        print(
            f"{len(cells)} cells to train on {device} with {values['workers']} worker(s) of {values['streams']} cell(s), {values['minutes']:g} minutes, batch {values['batch']}"
        )
        spawn = multiprocessing.get_context("spawn")
        taken = spawn.Value("i", 0)
        workers = [
            spawn.Process(target=work, args=(values, cells, taken, deadline, device, gpus[i % len(gpus)]))
            for i in range(min(values["workers"], len(cells)))
        ]
        for process in workers:
            process.start()
        end_by(workers, deadline + 60)
    report(values, device, time.time() - began)


if __name__ == "__main__":
    sys.exit(program(__doc__, main, interrupted="interrupted; finished cells are kept, and the same command goes on with the others"))
