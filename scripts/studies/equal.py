"""State tracking at equal parameters: the table of eight tasks, thirteen mixers and three seeds; JSON, table and plot to OUT.

    python -m scripts.studies.equal minutes=6                              # all GPUs that are visible; the same command goes on where it stopped
    python -m scripts.studies.equal tasks=S3,parity mixers=dense_gru,deltaproduct_2 seeds=1 minutes=3
    python -m scripts.studies.equal minutes=0                              # only the table and the plot of what is there
    python -m scripts.studies.equal minutes=0 known=docs/results/state_tracking page=docs/results/state_tracking.md     # those of all calls

Some processes a GPU, each with several cells on streams of their own (scripts/studies/equal_cells.py). Cells are ordered task after task and mixer
after mixer, those that decide most first, so that rows become whole, all seeds of them. known: a folder of tables of earlier calls; a cell that
ended there is not trained again, and stands in the table. Mixers that should fail take twice the steps of the slowest of those that succeed.
Each result is a file in OUT/cells; what the clock cuts is kept in OUT/states and goes on in a later call. `ended` says whether a cell was solved, took
all its steps, or ran out of time: a cell that ran out of time is no evidence that the mixer cannot do the task.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.fields import nearest
from data.files import check_writable, write_json
from data.synthetic import build_task
from scripts.studies.equal_cells import BURST, LENGTHS, MIXERS, TASKS, Learner, settings_of, variant
from scripts.studies.equal_known import furthest, recorded
from scripts.studies.equal_table import into_page, plot, table
from scripts.studies.tracking import place_and_time, visible_gpus
from scripts.studies.workers import end_by, end_with_parent
from training.config.arguments import parse_arguments, program
from training.errors import UserError

DEFAULTS: dict[str, Any] = {
    "out": "runs/state_tracking_equal",
    "tasks": "S3,parity,mod-5,2-hop,S4,mqar,A5,S5",
    "mixers": "all",
    "seeds": 3,
    "long": "",  # mixers of which seed 0 of A5 runs from the beginning to the end
    "known": "",  # a folder of tables (JSON) of earlier calls
    "page": "",  # a page of Markdown that takes up the table, between its marks
    "minutes": 6.0,
    "processes": 7,  # of a GPU
    "streams": 4,  # cells that a process trains at a time
    "compilers": 6,  # more processes, which compile kernels first and end then
    "length": 64,
    "batch": 128,
    "most": 0,  # steps at most, for a trial; 0: those of the task
    "device": "auto",
}
FIRST = ("dense_gru", "dense_lstm", "slstm", "m2rnn_tracker", "deltaproduct_4", "deltaproduct_2")
CONTROLS = ("mamba2", "paragru", "paralstm", "m2rnn", "gated_deltanet", "gated_deltanet_2", "transformer")
LEAST_CONTROL = 2000  # steps that a mixer that should fail may take in any case
MOST_COMPILING = 60.0  # seconds
TOLD_EVERY = 60.0  # seconds, after which each cell says where it is
REST = 5.0  # seconds, after which a cell that found no memory is tried again
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
    """All cells: long runs, then row by row in the order in which tasks and mixers are named (`all`: FIRST, then CONTROLS), all seeds of one."""
    tasks, seeds = values["tasks"], range(values["seeds"])
    mixers = values["mixers"] if values["mixers"] != list(MIXERS) else (*FIRST, *CONTROLS)
    long = [("A5", mixer, 0) for mixer in values["long"]]
    return list(dict.fromkeys([*long, *((task, mixer, seed) for task in tasks for mixer in mixers for seed in seeds)]))


def name_of(place: Place) -> str:
    return "{}.{}.{}".format(*place)


def read(out: Path, place: Place, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A cell on disk of the same settings, finished or cut, or None."""
    try:
        cell = json.loads((out / "cells" / f"{name_of(place)}.json").read_text())
    except (OSError, ValueError):
        return None
    return cell if cell.get("settings") == settings and "error" not in cell else None


def limit_of(cells: Sequence[dict[str, Any]], place: Place, most: int) -> int:
    """Steps that a cell may take: those of its task; of a control twice those that the slowest other mixer took to succeed, by the median of its
    seeds, where there is one. cells: all that are known."""
    task, mixer, _ = place
    steps = TASKS[task]["steps"]
    if mixer in CONTROLS:
        solved: dict[str, list[int]] = {}
        for cell in cells:
            if cell["task"] == task and cell.get("ended") == "solved" and cell["mixer"] not in CONTROLS:
                solved.setdefault(cell["mixer"], []).append(cell["solved"])
        slowest = max((statistics.median_high(s) for s in solved.values()), default=steps)
        steps = min(steps, max(LEAST_CONTROL, int(2 * slowest)))
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
    learner = Learner(settings, place[2], device, limit_of(known(values), place, values["most"]))
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
    cell["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() and values["device"] != "cpu" else "cpu"
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


def prepare(values: dict[str, Any], kinds: list[tuple[str, str, str]], taken: Any, visible: str, ready: dict[str, Any]) -> None:
    """Compiles what mixers need on a GPU for such tasks, one after the other, so that no process that trains has to wait for it, and says so of each.
    kinds: names of `variant`, each with a task and a mixer; taken: counts those begun by all compilers."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    end_with_parent()
    device = pick(visible, "cuda")
    while True:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= len(kinds):
            return
        kind, task, mixer = kinds[number]
        try:
            learner = Learner(settings_of(task, mixer, values), 0, device, 1)
            learner.warm()
            learner.score(values["length"] * LENGTHS[-1], values["batch"])
        except Exception as error:  # the process that trains it will say so again, in the cell
            print(f"{kind} was not compiled: {type(error).__name__}: {str(error)[:200]}", flush=True)
        finally:
            ready[kind].set()


def pick(visible: str, device_name: str) -> Any:
    """The device of this process."""
    if visible:  # before anything here asks for a device
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import torch

    torch.set_num_threads(1)
    return torch.device(device_name)


def no_room(error: Exception) -> bool:
    """Whether the device's memory was full, as PyTorch's allocator or the driver says it."""
    return "out of memory" in str(error).lower()


def work(
    values: dict[str, Any], cells: list[Place], taken: Any, ready: dict[str, Any], deadline: float, device_name: str, visible: str
) -> None:
    """One process: takes cells until none or no time is left, `streams` at a time. taken: counts those given out; ready: of variants of mixers whose
    kernels are being compiled, when they are; deadline: of time.time(). Ctrl-C is as if time were up: what is under way is kept."""
    stopped: list[int] = []
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
        end_with_parent()
    device = pick(visible, device_name)
    waiting: list[Place] = []
    running: list[tuple[Place, Learner, float]] = []
    more, told, rest = True, time.time(), 0.0

    def late() -> bool:
        return bool(stopped) or time.time() > deadline - SCORING * len(running) / 4 - 1

    while True:
        while more and not late() and len(running) + len(waiting) < values["streams"]:
            with taken.get_lock():
                number, taken.value = taken.value, taken.value + 1
            more = number < len(cells)
            waiting += cells[number : number + 1]
        place = next((p for p in waiting if (kind := variant(*p[:2])) not in ready or ready[kind].is_set()), None)
        if place is not None and not late() and time.time() > rest:  # one, and the others go on
            waiting.remove(place)
            try:
                running.append((place, begin(place, values, device), time.perf_counter()))
            except Exception as error:
                if no_room(error):  # others have the card's memory, for now
                    waiting, rest = [place, *waiting], time.time() + REST
                    print(f"{name_of(place)} finds no room in the device's memory and is tried again in {REST:.0f} s", flush=True)
                else:
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
            if problem is not None and device.type == "cuda" and "CUDA" in str(problem) and not no_room(problem):
                return  # the device is lost to this process


def known(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cell of these settings on disk, here and in the folder `known`, each as far as it came; in the table's order."""
    seeds = range(values["seeds"])
    places = [(t, m, s) for t in TASKS for m in MIXERS for s in seeds]
    here = [cell for place in places if (cell := read(Path(values["out"]), place, settings_of(*place[:2], values))) is not None]
    before = recorded(Path(values["known"])) if values["known"] else []
    found = furthest([cell for cell in before if cell["settings"] == settings_of(cell["task"], cell["mixer"], values)] + here)
    return [found[place] for place in places if place in found]


def collect(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The known cells that were asked for, but those that the clock cut before a tenth of their steps, which are as good as not begun."""
    asked = set(order(values))
    begun = [cell for cell in known(values) if cell["ended"] != "time" or 10 * cell["step"] >= cell["limit"]]
    return [cell for cell in begun if (cell["task"], cell["mixer"], cell["seed"]) in asked]


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
    if values["page"]:
        into_page(Path(values["page"]), text)
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
    over = {(cell["task"], cell["mixer"], cell["seed"]) for cell in known(values) if cell["ended"] != "time"}
    cells = [place for place in order(values) if place not in over]
    deadline = began + 60 * values["minutes"]
    if cells and values["minutes"] > 0:
        processes = values["processes"] * len(gpus) if device == "cuda" else 1
        print(
            f"{len(cells)} cells on {len(gpus)} x {device}, {processes} processes of {values['streams']} cells, {values['minutes']:.2f} minutes",
            flush=True,
        )
        spawn = multiprocessing.get_context("spawn")
        first = {variant(task, mixer): (task, mixer) for task, mixer, _ in reversed(cells)} if device == "cuda" else {}
        kinds = [(kind, *first[kind]) for kind in reversed(first)]
        taken, ready = spawn.Value("i", 0), {kind: spawn.Event() for kind, *_ in kinds}
        workers = [
            spawn.Process(target=work, args=(values, cells, taken, ready, deadline, device, gpus[i % len(gpus)]))
            for i in range(min(processes, len(cells)))
        ]
        begun = spawn.Value("i", 0)
        compilers = [
            spawn.Process(target=prepare, args=(values, kinds, begun, gpus[i % len(gpus)], ready))
            for i in range(min(values["compilers"], len(kinds)))
        ]
        for process in (*compilers, *workers):
            process.start()
        for event in ready.values():
            event.wait(max(1.0, began + MOST_COMPILING - time.time()))
            event.set()
        print(f"kernels compiled after {time.time() - began:.0f} s", flush=True)
        end_by([*workers, *compilers], deadline + 20)
    report(values, device, time.time() - began)


if __name__ == "__main__":
    sys.exit(
        program(__doc__, main, interrupted="interrupted; cells under way are kept, and the same command goes on where this one stopped")
    )
