"""Which word problems the delta rule learns, by updates a token and by where its eigenvalues begin, and MQAR: all arms beside each other on one device.

    python -m scripts.studies.delta_table --out runs/delta_table --seconds 290          # S4, A5 and S5, three seeds, one GPU
    python -m scripts.studies.delta_table --out runs/delta_table --tasks s3,mqar --ranges=-1,0 --seconds 290
    python -m scripts.studies.delta_table --out runs/delta_table --seconds 290          # the same again: what the clock cut goes on
    python -m scripts.studies.delta_table --out runs/small --tasks s3 --updates 1,2 --seeds 1 --steps 300 --seconds 60

One layer of width 64, four heads of 16 (--head-dim), neither gate, a convolution of two tokens (of four for MQAR, 8 pairs in 64 tokens). Words are climbed
along the ladder of lengths of scripts/studies/equal_cells.py up to `length`, at a rate that falls with the root of the length from 8 on; a batch has as
many tokens at every length, and a length that is not learnt is not left. A process for each number of updates and task, in it every arm on a stream of its
own, a burst of CUDA graphs of each in turn: so an arm that cannot learn takes as many steps as one that can, or more, as an arm ends when it is solved.
Scored at 1, 2, 4 and 8 times the length. Every arm is a line of OUT/arms.TASK.UPDATES.jsonl, written when it ends; OUT/table.json and the printed table
are made of all of them. What an arm that is not solved goes on from is kept in OUT/states.TASK.UPDATES.pt, every minute and in the end; one whose settings
have changed begins anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from data.synthetic import build_task
from scripts.studies.equal_cells import BURST, LENGTHS, Learner, settings_of
from scripts.studies.options import refuse
from scripts.studies.workers import end_by, end_with_parent
from training.watch.metrics import environment

TASKS: dict[str, dict[str, Any]] = {
    **{group: {"name": "word_problem", "group": group} for group in ("s3", "s4", "a5", "s5")},
    "mqar": {"name": "mqar", "pairs": 8, "symbols": 128},
}
PAIRS_LENGTH = 64
CLIMBED = 0.2  # nats that end a rung: S4 by two updates was at words of 9 after 1,180 steps, but of 5 after 2,100 where 0.05 ended one
SETTLES = 400  # steps at the longest words after which the rate falls as one over them: an A5 arm hovered at 0.997 for 1,900 steps without
SCORING = 0.5  # seconds for the last scores of an arm
KEPT_EVERY = 60.0  # seconds, after which what arms go on from is written again: whoever ends this study sooner than it thinks loses no more


def settings(task: str, updates: int, negative: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Of a cell of scripts/studies/equal_cells.py, with this task and layer."""
    mqar = task == "mqar"
    length, batch = (PAIRS_LENGTH, max(1, given.batch * given.length // PAIRS_LENGTH)) if mqar else (given.length, given.batch)
    layer = {
        "type": "delta",
        "n_heads": 4,
        "head_dim": given.head_dim,
        "updates": updates,
        "negative": negative,
        "gate": False,
        "output_gate": False,
    }
    usual = settings_of("mqar" if mqar else "S3", "deltaproduct_2", {"length": length, "batch": batch})
    changes = (
        {"first": PAIRS_LENGTH, "lr": 3e-3, "promising": 0.1, "solved": 0.98}
        if mqar
        else {"falls": True, "climbed": CLIMBED, "settles": SETTLES, "curriculum": 0.0, "first": given.first}
    )
    return {**usual, "task": TASKS[task], "layer": {**layer, "d_conv": 4 if mqar else 2}, "bound": None, **changes}


def kept_of(path: Path, device: torch.device) -> dict[str, dict[str, Any]]:
    """What an earlier call left of a worker's arms, by their names: settings, row and state."""
    try:
        return torch.load(path, map_location=device, weights_only=True) if path.exists() else {}
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError):  # cut while it was copied
        print(f"{path} cannot be read; its arms begin anew.", flush=True)
        return {}


class Place:
    """A task and so many updates a token: its arms, in OUT/arms.TASK.UPDATES.jsonl and OUT/states.TASK.UPDATES.pt."""

    def __init__(self, task: str, updates: int, given: argparse.Namespace, began: float, device: torch.device) -> None:
        self.task, self.updates, self.given, self.began, self.device = task, updates, given, began, device
        self.chance = round(1 / len(build_task(TASKS[task]).vocabulary()), 4)
        self.path = given.out / f"states.{task}.{updates}.pt"
        self.before, self.after = kept_of(self.path, device), dict[str, dict[str, Any]]()
        self.lines = (given.out / f"arms.{task}.{updates}.jsonl").open("w")

    def write(self, row: dict[str, Any]) -> None:
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        shown = {k: v for k, v in row.items() if k not in ("curve", "chance")}
        print(*shown.values(), round(time.time() - self.began), flush=True)

    def learners(self) -> Iterator[tuple[dict[str, Any], Learner]]:
        """(arm, learner) of those that have steps left, ready to run; what an earlier call left is gone on from."""
        for seed in range(self.given.seeds):
            for least in self.given.ranges:
                what, set_as = {"negative": least < 0, "seed": seed}, settings(self.task, self.updates, least < 0, self.given)
                kept = self.before.get(name_of(what), {})
                kept = kept if kept.get("settings") == json.dumps(set_as) else {}
                if kept and (kept["state"] is None or kept["row"]["steps"] >= self.given.steps):
                    self.after[name_of(what)] = kept
                    self.write(kept["row"])
                    continue
                learner = warmed(set_as, seed, self.device, self.given.steps)
                if kept:
                    learner.load(kept["state"])
                yield what, learner

    def end(self, what: dict[str, Any], learner: Learner) -> None:
        """The last scores of an arm, and what it can go on from."""
        result = learner.result()
        scores = {str(row["length"]): round(row["accuracy"], 4) for row in result["lengths"]}
        row = {
            "task": self.task, "updates": self.updates, **what, "steps": result["step"], "solved": result["solved"], "words": learner.n,
            "ended": result["ended"], "scores": scores, "chance": self.chance, "curve": result["curve"],
        }  # fmt: skip
        state = None if row["ended"] == "solved" else learner.state()
        self.after[name_of(what)] = {"settings": json.dumps(learner.settings), "row": row, "state": state}
        self.write(row)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what is cached on one stream is of no use to the others

    def keep(self, running: list[tuple[dict[str, Any], Learner]]) -> None:
        """Writes what arms go on from: those that ended here and those that still run."""
        now = {name_of(what): learner for what, learner in running}
        on = {
            name: {"settings": json.dumps(at.settings), "row": {"steps": at.progress.step}, "state": at.state()} for name, at in now.items()
        }
        torch.save({**self.after, **on}, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)


def warmed(set_as: dict[str, Any], seed: int, device: torch.device, steps: int) -> Learner:
    """A learner whose kernels are compiled."""
    learner = Learner(set_as, seed, device, steps)
    learner.warm()
    learner.score(learner.T * LENGTHS[-1], learner.B)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return learner


def work(task: str, updates: int, given: argparse.Namespace, began: float, device_name: str) -> None:
    """Every arm of a task and so many updates, a burst of each in turn."""
    end_with_parent()
    torch.set_num_threads(1)
    place = Place(task, updates, given, began, torch.device(device_name))
    running = list(place.learners())
    print(f"{task} {updates}: {len(running)} arms begin after {time.time() - began:.0f} s", flush=True)
    kept = time.time()
    while running and time.time() - began < given.seconds - SCORING * len(running):
        if time.time() - kept > KEPT_EVERY:
            place.keep(running)
            kept = time.time()
        for arm in list(running):
            what, learner = arm
            learner.burst(BURST)
            learner.look()
            if learner.ended:
                place.end(what, learner)
                running.remove(arm)
    for what, learner in running:
        place.end(what, learner)
    place.lines.close()
    place.keep([])


def name_of(arm: dict[str, Any]) -> str:
    return f"{arm['seed']} from {-1 if arm['negative'] else 0}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: lowest and highest seed by task, updates and range. Words: the lengths that were reached."""
    lines = [
        "| task | updates | eigenvalues from | seeds solved | steps | words of | accuracy by length, lowest to highest seed | chance |",
        "|---" * 8 + "|",
    ]
    for key in sorted({(r["task"], r["updates"], not r["negative"]) for r in rows}):
        same = [r for r in rows if (r["task"], r["updates"], not r["negative"]) == key]
        steps, words = sorted(r["solved"] or r["steps"] for r in same), sorted(r["words"] for r in same)
        shown = "; ".join(
            f"{n}: {min(r['scores'][n] for r in same):.3f} to {max(r['scores'][n] for r in same):.3f}" for n in same[0]["scores"]
        )
        solved = f"{sum(bool(r['solved']) for r in same)} of {len(same)}"
        lines.append(
            f"| {key[0]} | {key[1]} | {0 if key[2] else -1} | {solved} | {steps[0]:,} to {steps[-1]:,} | {words[0]} to {words[-1]} | {shown} "
            f"| {same[0]['chance']:.3f} |"
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="s4,a5,s5")
    parser.add_argument("--updates", default="1,2,3,4")
    parser.add_argument("--ranges", default="-1", help="the lowest eigenvalue of an update: -1, 0 or both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=290.0, help="in all, compiling and scoring included")
    parser.add_argument("--steps", type=int, default=8000, help="the most of an arm; over the last fifth of them the rate falls")
    parser.add_argument("--length", type=int, default=32, help="of the longest words that are trained on")
    parser.add_argument("--batch", type=int, default=256, help="rows of that length in a step")
    parser.add_argument("--first", type=int, default=2, help="length of the first words; pairs can be learnt by heart, by the convolution")
    parser.add_argument("--head-dim", type=int, default=16, help="width of the four heads; kernels take 64 at least")
    given = parser.parse_args()
    refuse(parser, given, ["seeds", "seconds", "steps", "length", "batch", "first", "head_dim"], {"tasks": TASKS})
    given.tasks = given.tasks.split(",")
    for name, known in (("updates", range(1, 17)), ("ranges", (-1, 0))):
        try:
            numbers = [int(n) for n in getattr(given, name).split(",")]
        except ValueError:
            numbers = []
        if not numbers or any(n not in known for n in numbers):
            parser.error(
                f"--{name} takes numbers from {known[0]} to {known[-1]} such as {known[0]},{known[1]}, not {getattr(given, name)}."
            )
        setattr(given, name, numbers)
    return given


def main() -> None:
    began, given = time.time(), parsed()
    given.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spawn = multiprocessing.get_context("spawn")
    places = [(task, n) for task in given.tasks for n in given.updates]
    workers = [spawn.Process(target=work, args=(*place, given, began, device)) for place in places]
    for worker in workers:
        worker.start()
    end_by(workers, began + given.seconds + 15)
    files = [given.out / "arms.{}.{}.jsonl".format(*place) for place in places]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    arguments = {key: str(value) if key == "out" else value for key, value in vars(given).items()}
    write_json(given.out / "table.json", {"arguments": arguments, "environment": environment(torch.device(device)), "arms": rows})
    print(summary(rows))


if __name__ == "__main__":
    main()
