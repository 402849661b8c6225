"""State tracking at equal parameters: the table of eight tasks, thirteen mixers and three seeds, and one long run of A5; JSON, table and plot to OUT.

    python -m scripts.studies.equal minutes=6                              # all GPUs that are visible; the same command goes on where it stopped
    python -m scripts.studies.equal tasks=S3,parity mixers=dense_gru,deltaproduct_2 seeds=1 minutes=3
    python -m scripts.studies.equal minutes=0                              # only the table and the plot of what is there

Some processes a GPU, each with several cells on streams of their own (scripts/studies/equal_cells.py). Cells are ordered a seed after the other: S3,
parity and modulo 5 by all mixers, S4, MQAR and S5 by those that are expected to succeed, and the rest when all seeds have these. Mixers that should
fail take twice the steps of the slowest success there.
Each result is a file in OUT/cells; what the clock cuts is kept in OUT/states and goes on in a later call. `ended` says whether a cell was solved, took
all its steps, or ran out of time: a cell that ran out of time is no evidence that the mixer cannot do the task.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from data.fields import nearest
from data.files import check_writable, write_json
from data.synthetic import build_task
from scripts.studies.equal_cells import BURST, LENGTHS, MIXERS, TASKS, Learner, settings_of
from scripts.studies.equal_table import plot, table
from scripts.studies.tracking import place_and_time, visible_gpus
from scripts.studies.workers import end_by, end_with_parent
from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {
    "out": "runs/state_tracking_equal",
    "tasks": "S3,parity,S4,A5,mod-5,S5,2-hop,mqar",
    "mixers": "all",
    "seeds": 3,
    "long": "",  # mixers that run A5-long beside the table, one seed each, from the beginning to the end
    "minutes": 6.0,
    "processes": 7,  # of a GPU
    "streams": 4,  # cells that a process trains at a time
    "length": 64,
    "batch": 128,
    "most": 0,  # steps at most, for a trial; 0: those of the task
    "device": "auto",
}
FIRST = ("dense_gru", "m2rnn_tracker", "dense_lstm", "slstm", "deltaproduct_4", "deltaproduct_2", "m2rnn")
CONTROLS = ("transformer", "mamba2", "gated_deltanet", "paragru", "gated_deltanet_2", "paralstm")
EARLY = (
    ("S3", (*FIRST, *CONTROLS)),
    ("parity", (*FIRST, *CONTROLS)),
    ("mod-5", (*FIRST, *CONTROLS)),
    ("S4", FIRST),
    ("mqar", (*FIRST, *CONTROLS)),
    ("S5", FIRST),
)
MOST_COMPILING = 60.0  # seconds
TOLD_EVERY = 60.0  # seconds, after which each cell says where it is
SCORING = 2.0  # seconds kept for the scores of each cell that is under way in the end

Place = tuple[str, str, int]


def arguments(words: list[str]) -> dict[str, Any]:
    """key=value arguments over DEFAULTS, with lists of names. Raises UserError with all problems."""

    def chosen(values: dict[str, Any]) -> list[str]:
        problems = []
        for key, known in (("tasks", TASKS), ("mixers", MIXERS), ("long", MIXERS)):
            names = [name.strip() for name in values[key].split(",") if name.strip()]
            names = list(known) if names == ["all"] else names
            problems += [f"{key}: {nearest(name, list(known))} (there is no {name!r})" for name in names if name not in known]
            values[key] = names
        if not values["long"] and not (values["tasks"] and values["mixers"]):
            problems.append("Name a task with tasks= and a mixer with mixers=, or a mixer with long=.")
        least = max([build_task(TASKS[task]["task"]).min_length() for task in values["tasks"] if task in TASKS], default=2)
        if values["length"] < max(2, least):
            problems.append(f"length is {values['length']}; these tasks need {max(2, least)} or more.")
        return problems + place_and_time(values)

    return parse_arguments(words, DEFAULTS, chosen)


def order(values: dict[str, Any]) -> list[Place]:
    """All cells: long runs, what decides most, seed after seed, then the rest."""
    tasks, mixers, seeds = values["tasks"], values["mixers"], range(values["seeds"])
    decisive = [(t, m, s) for s in seeds for t, chosen in EARLY for m in chosen]
    rest = [(t, m, s) for s in seeds for t in tasks for m in (*FIRST, *CONTROLS)]
    every = [place for place in [*decisive, *rest] if place[0] in tasks and place[1] in mixers]
    return [("A5-long", m, 0) for m in values["long"]] + list(dict.fromkeys(every))


def name_of(place: Place) -> str:
    return "{}.{}.{}".format(*place)


def read(out: Path, place: Place, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A cell on disk of the same settings, finished or cut, or None."""
    try:
        cell = json.loads((out / "cells" / f"{name_of(place)}.json").read_text())
    except (OSError, ValueError):
        return None
    return cell if cell.get("settings") == settings and "error" not in cell else None


def limit_of(out: Path, place: Place, most: int) -> int:
    """Steps that a cell may take: those of its task, of a control twice those that the slowest success took, where there were three."""
    task, mixer, _ = place
    steps = TASKS[task]["steps"]
    if mixer in CONTROLS:
        cells = [json.loads(path.read_text()) for path in (out / "cells").glob(f"{task}.*.json")]
        slowest = [cell["solved"] for cell in cells if cell.get("ended") == "solved" and cell["mixer"] not in CONTROLS]
        steps = min(steps, max(500, 2 * max(slowest))) if len(slowest) >= 3 else steps
    return min(steps, most) if most else steps


def tell(running: list[tuple[Place, Learner, float]]) -> None:
    """Says where each cell under way is."""
    for place, learner, _ in running:
        curve = learner.progress.curve
        loss = f", loss {curve[-1][2]:.3f}" if curve else ""
        print(f"{name_of(place)} step {learner.progress.step}/{learner.progress.limit} at {learner.n} of {learner.T}{loss}", flush=True)


def begin(place: Place, values: dict[str, Any], device: Any) -> Learner:
    """A cell, from its beginning or from where it was cut."""
    import torch

    out, settings = Path(values["out"]), settings_of(*place[:2], values)
    learner = Learner(settings, place[2], device, limit_of(out, place, values["most"]))
    learner.warm()
    cut = read(out, place, settings)
    if cut is not None and (path := out / "states" / f"{name_of(place)}.pt").exists():
        learner.load(torch.load(path, map_location=device, weights_only=True))
    return learner


def keep(place: Place, learner: Learner | None, values: dict[str, Any], error: Exception | None = None) -> None:
    """Writes what became of a cell, with its state where it can go on, and says it."""
    import torch

    out, name = Path(values["out"]), name_of(place)
    cell: dict[str, Any] = dict(zip(("task", "mixer", "seed"), place)) | {"settings": settings_of(*place[:2], values)}
    path = out / "states" / f"{name}.pt"
    if learner is None or error is not None:
        cell |= {"error": f"{type(error).__name__}: {str(error)[:300]}", "traceback": traceback.format_exc()[-3000:]}
        print(f"{name} {cell['error']}", flush=True)
    else:
        cell |= learner.result()
        path.unlink(missing_ok=True)
        if cell["ended"] == "time":
            torch.save(learner.state(), path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        shown = " ".join(f"{row['length']}: {100 * row['accuracy']:.1f}" for row in cell["lengths"])
        print(
            f"{name} {cell['ended']} {cell['step']}/{cell['limit']} at {learner.n} {cell['seconds']:.0f} s {cell['parameters']}  {shown}",
            flush=True,
        )
    write_json(out / "cells" / f"{name}.json", cell)


def prepare(values: dict[str, Any], mixer: str, visible: str, ready: Any) -> None:
    """Compiles what a mixer needs on a GPU, so that no process that trains has to wait for it; then says so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    end_with_parent()
    try:
        device = pick(visible, "cuda")
        learner = Learner(settings_of("S3", mixer, values), 0, device, 1)
        learner.warm()
        learner.score(values["length"] * LENGTHS[-1], values["batch"])
    finally:
        ready.set()


def pick(visible: str, device_name: str) -> Any:
    """The device of this process."""
    if visible:  # before anything here asks for a device
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import torch

    torch.set_num_threads(1)
    return torch.device(device_name)


def work(
    values: dict[str, Any], cells: list[Place], taken: Any, ready: dict[str, Any], deadline: float, device_name: str, visible: str
) -> None:
    """One process: takes cells until none or no time is left, `streams` at a time. taken: counts those given out; ready: of mixers whose kernels are
    being compiled, when they are; deadline: of time.time(). Ctrl-C is as if time were up: what is under way is kept."""
    stopped: list[int] = []
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
        end_with_parent()
    device = pick(visible, device_name)
    waiting: list[Place] = []
    running: list[tuple[Place, Learner, float]] = []
    more, told = True, time.time()

    def late() -> bool:
        return bool(stopped) or time.time() > deadline - SCORING * len(running) / 4 - 1

    while True:
        while more and not late() and len(running) + len(waiting) < values["streams"]:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            more = number < len(cells)
            waiting += cells[number : number + 1]
        place = next((place for place in waiting if place[1] not in ready or ready[place[1]].is_set()), None)
        if place is not None and not late():  # one, and the others go on
            waiting.remove(place)
            try:
                running.append((place, begin(place, values, device), time.perf_counter()))
            except Exception as error:
                keep(place, None, values, error)
        elif not running and waiting:
            time.sleep(0.05)
        if not running and (late() or not (more or waiting)):
            return
        if time.time() > told + TOLD_EVERY:
            told = time.time()
            tell(running)
        for entry in list(running):
            place, learner, since = entry
            problem: Exception | None = None
            try:
                if not late():
                    learner.burst(BURST)
                    learner.look()
                if not late() and not learner.ended:
                    continue
                learner.progress.seconds += time.perf_counter() - since
                keep(place, learner, values)
            except Exception as error:
                problem = error
                keep(place, None, values, problem)
            running.remove(entry)
            if problem is not None and device.type == "cuda" and "CUDA" in str(problem) and "OutOfMemory" not in type(problem).__name__:
                return  # the device is lost to this process


def collect(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cell of these settings on disk, in the table's order."""
    out = Path(values["out"])
    places = [(t, m, s) for t in values["tasks"] for m in MIXERS if m in values["mixers"] for s in range(values["seeds"])]
    places += [("A5-long", m, 0) for m in MIXERS if m in values["mixers"] or m in values["long"]]
    return [cell for place in places if (cell := read(out, place, settings_of(*place[:2], values))) is not None]


def report(values: dict[str, Any], device: str, seconds: float) -> None:
    """Writes table.json, table.md and the plot from the cells on disk, and prints the table."""
    import torch

    from training.watch.metrics import environment

    cells, out = collect(values), Path(values["out"])
    if not cells:
        raise UserError(f"{out} has no finished cell of these settings; train some, with minutes above zero.")
    text = table(cells, values["length"], LENGTHS)
    kept = {"arguments": values, "seconds": seconds, "environment": environment(torch.device(device)), "cells": cells}
    if values["minutes"] or not (out / "table.json").exists():
        write_json(out / "table.json", kept)
    (out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{len(cells)} cells: {out / 'table.json'}")
    print(plot(cells, values["length"], out / "table.png"))


def main(words: list[str]) -> None:
    """What the command line asks for. Raises UserError."""
    began, values = time.time(), arguments(words)
    import torch

    device = values["device"] if values["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; use device=auto.")
    gpus, out = visible_gpus(device), Path(values["out"])
    if values["minutes"]:
        check_writable(out)
        for folder in ("cells", "states"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    there = {place: read(out, place, settings_of(*place[:2], values)) for place in order(values)}
    cells = [place for place, cell in there.items() if cell is None or cell["ended"] == "time"]
    deadline = began + 60 * values["minutes"]
    if cells and values["minutes"] > 0:
        processes = values["processes"] * len(gpus) if device == "cuda" else 1
        print(
            f"{len(cells)} cells on {len(gpus)} x {device}, {processes} processes of {values['streams']} cells, {values['minutes']:.2f} minutes",
            flush=True,
        )
        spawn = multiprocessing.get_context("spawn")
        first = list(dict.fromkeys(mixer for _, mixer, _ in cells)) if device == "cuda" else []
        taken, ready = spawn.Value("i", 0), {mixer: spawn.Event() for mixer in first}
        workers = [
            spawn.Process(target=work, args=(values, cells, taken, ready, deadline, device, gpus[i % len(gpus)]))
            for i in range(min(processes, len(cells)))
        ]
        compilers = [
            spawn.Process(target=prepare, args=(values, mixer, gpus[i % len(gpus)], event))
            for i, (mixer, event) in enumerate(ready.items())
        ]
        for process in (*compilers, *workers):
            process.start()
        for event in ready.values():
            event.wait(max(1.0, began + MOST_COMPILING - time.time()))
            event.set()
        print(f"kernels compiled after {time.time() - began:.0f} s", flush=True)
        end_by(workers, deadline + 20)
    report(values, device, time.time() - began)


if __name__ == "__main__":
    sys.exit(
        program(__doc__, main, interrupted="interrupted; cells under way are kept, and the same command goes on where this one stopped")
    )
