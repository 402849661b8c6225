"""Which word problems the delta rule learns, by updates a token and by where its eigenvalues begin, and MQAR: all arms beside each other on one device.

    python -m scripts.studies.delta_table --out runs/delta_table --seconds 290          # S3, S4, A5, S5 and MQAR, three seeds, one GPU
    python -m scripts.studies.delta_table --out runs/small --tasks s3 --updates 1,2 --seeds 1 --steps 300 --seconds 60

The model is that of scripts/studies/delta_tracking.py: one layer of width 64, four heads of 16, no gate. One process for each number of updates (its
kernels are compiled there), in it every arm on a stream of its own, a step one CUDA graph, a burst of each in turn: so an arm that cannot learn has had
as many steps as one that can, or more, as an arm ends when it is solved (0.98 at four times the length). Groups: 16 factors, scored at 16, 32, 64 and 128;
MQAR: 8 pairs in 64 tokens, scored there and at 128. The learning rate falls to a tenth over the second half of the time (or of the steps).
Every arm is a line of OUT/arms.UPDATES.jsonl, written when it ends; OUT/table.json and the printed table are made of all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import write_json
from data.synthetic import build_task
from data.synthetic.source import SyntheticReader
from data.synthetic.task import IGNORE
from scripts.studies.delta_tracking import GROUPS, model_of, problem, table
from scripts.studies.options import refuse
from scripts.studies.tracking import end_by
from scripts.studies.trainer import Trainer
from training.watch.metrics import environment

RATE, WARMUP, BURST, CHECK, SOLVED = 3e-3, 50, 20, 200, 0.98
LENGTH, FAR = 16, (16, 32, 64, 128)
PAIRS: dict[str, Any] = {"name": "mqar", "pairs": 8, "symbols": 128}
PAIRS_LENGTH, PAIRS_FAR = 64, (64, 128)


@lru_cache(maxsize=64)
def samples(task: str, rows: int, length: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """(ids, answers) (rows, length), of words by group or of MQAR, whose other positions are IGNORE."""
    if task == "mqar":
        ids, answers, *_ = SyntheticReader(build_task(PAIRS), length, seed).labelled(np.arange(rows))
        pair = torch.as_tensor(ids), torch.as_tensor(answers)
    else:
        pair = problem(table(task), rows, length, torch.Generator().manual_seed(seed))
    return pair[0].to(device, torch.int16), pair[1].to(device, torch.int16)


def elements(task: str) -> int:
    return len(build_task(PAIRS).vocabulary()) if task == "mqar" else len(table(task))


class Arm:
    """One model in training."""

    def __init__(self, what: dict[str, Any], given: argparse.Namespace, device: torch.device) -> None:
        self.what, self.given, self.device = what, given, device
        self.task, self.mqar = what["task"], what["task"] == "mqar"
        self.far = PAIRS_FAR if self.mqar else FAR
        torch.manual_seed(what["seed"])
        model = model_of(elements(self.task), what["updates"], what["negative"], gate=False)
        model.init_weights(what["seed"])
        self.trainer = Trainer(model, device, lr=RATE, betas=(0.9, 0.999), weight_decay=0.01, bf16=True)
        rows, count = given.batch // (2 if self.mqar else 1), given.samples // (8 if self.mqar else 1)
        ids, answers = samples(self.task, count, self.far[0], 1, str(device))
        with self.trainer.here():
            place = torch.full((), what["seed"] * count // 3, dtype=torch.long, device=device)
            ahead, self.loss = torch.arange(rows, device=device), torch.zeros((), device=device)

        def step() -> tuple[Tensor, ...]:
            index = (place + ahead) % count
            place.add_(rows)
            loss = self.trainer.update(ids[index].long(), answers[index].long())[0]
            self.loss.copy_(loss)
            return (loss,)

        self.graph, self.steps, self.end, self.curve = self.trainer.graph(step), 0, None, list[list[float]]()

    def burst(self, passed: float) -> None:
        """BURST steps, no more than two bursts ahead of the device. passed: share of the time that is over."""
        rate = RATE * min(1.0, (self.steps + 1) / WARMUP, max(0.1, round(2 - 2 * passed, 1)))
        for _ in self.trainer.run(self.graph, range(BURST), lambda _: rate):
            pass
        self.steps += BURST
        if self.trainer.stream is not None:
            if self.end is not None:
                self.end.synchronize()
            self.end = self.trainer.stream.record_event()

    @torch.no_grad()
    def score(self, lengths: tuple[int, ...]) -> dict[str, float]:
        """Accuracy over all answers, by length, of sequences that no arm is trained on."""
        out = {}
        for n in lengths:
            ids, answers = samples(self.task, 256, n, 10**6 + n, str(self.device))
            with self.trainer.here():  # the answer is read here too: no stream waits for another
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.trainer.bf16):
                    right = self.trainer.model(ids.long()).logits.argmax(-1) == answers
                out[str(n)] = round(right[answers != IGNORE].float().mean().item(), 4)
        return out

    def check(self) -> bool:
        """Writes a point of the curve; whether it is solved."""
        now = self.score((self.far[0], self.far[-1] if self.mqar else 4 * LENGTH))
        with self.trainer.here():
            self.curve.append([self.steps, round(float(self.loss), 4), *now.values()])
        return min(now.values()) > SOLVED

    def result(self, ended: str) -> dict[str, Any]:
        return {
            **self.what,
            "steps": self.steps,
            "ended": ended,
            "scores": self.score(self.far),
            "chance": self.chance(),
            "curve": self.curve,
        }

    def chance(self) -> float:
        return round(1 / (PAIRS["symbols"] if self.mqar else elements(self.task)), 4)


def work(updates: int, given: argparse.Namespace, began: float, device_name: str) -> None:
    """Every arm of so many updates a token, a burst of each in turn."""
    device = torch.device(device_name)
    torch.set_num_threads(1)
    names = [(t, negative, seed) for t in given.tasks for negative in (True, False) for seed in range(given.seeds)]
    lines = (given.out / f"arms.{updates}.jsonl").open("w")

    def write(row: dict[str, Any]) -> None:
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        print(
            updates,
            {k: row[k] for k in ("task", "negative", "seed", "steps", "ended")},
            row["scores"],
            round(time.time() - began),
            flush=True,
        )

    running = [Arm({"task": t, "updates": updates, "negative": n, "seed": s}, given, device) for t, n, s in names]
    end = given.seconds - given.scoring * len(running)
    passed = 0.0
    while running and passed < 1:
        for arm in list(running):
            arm.burst(passed)
            if arm.steps % CHECK == 0 and arm.check():
                write(arm.result("solved"))
                running.remove(arm)
            if time.time() - began > end:
                break
        passed = max((time.time() - began) / end, max((arm.steps for arm in running), default=0) / given.steps)
    for arm in running:
        write(arm.result("steps" if arm.steps >= given.steps else "time"))


def summary(rows: list[dict[str, Any]]) -> str:
    """Markdown: lowest and highest seed by task, updates and range."""
    lines = [
        "| task | updates | eigenvalues from | seeds solved | steps | accuracy by length, lowest to highest seed | chance |",
        "|---" * 7 + "|",
    ]
    for key in sorted({(r["task"], r["updates"], not r["negative"]) for r in rows}):
        same = [r for r in rows if (r["task"], r["updates"], not r["negative"]) == key]
        steps = sorted(r["steps"] for r in same)
        shown = "; ".join(
            f"{n}: {min(r['scores'][n] for r in same):.3f} to {max(r['scores'][n] for r in same):.3f}" for n in same[0]["scores"]
        )
        solved = f"{sum(r['ended'] == 'solved' for r in same)} of {len(same)}"
        lines.append(
            f"| {key[0]} | {key[1]} | {0 if key[2] else -1} | {solved} | {steps[0]:,} to {steps[-1]:,} | {shown} | {same[0]['chance']:.3f} |"
        )
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="s3,s4,a5,s5,mqar")
    parser.add_argument("--updates", default="1,2,4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=290.0, help="in all, compiling and scoring included")
    parser.add_argument("--steps", type=int, default=100_000, help="the most of an arm")
    parser.add_argument("--batch", type=int, default=256, help="rows of 16 factors; MQAR takes half as many of 64 tokens")
    parser.add_argument("--samples", type=int, default=1 << 19, help="sequences of each group to train on; of MQAR an eighth")
    parser.add_argument("--scoring", type=float, default=0.15, help="seconds for the last scores of an arm")
    given = parser.parse_args()
    refuse(parser, given, ["seeds", "seconds", "steps", "batch", "samples"], {"tasks": (*GROUPS, "mqar")})
    given.tasks = given.tasks.split(",")
    try:
        given.updates = [int(n) for n in given.updates.split(",")]
    except ValueError:
        parser.error(f"--updates takes numbers such as 1,2, not {given.updates}.")
    return given


def main() -> None:
    began, given = time.time(), parsed()
    given.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(n, given, began, device)) for n in given.updates]
    for worker in workers:
        worker.start()
    end_by(workers, began + given.seconds + 15)
    rows = [json.loads(line) for n in given.updates for line in (given.out / f"arms.{n}.jsonl").read_text().splitlines()]
    settings = {key: str(value) if key == "out" else value for key, value in vars(given).items()}
    write_json(given.out / "table.json", {"arguments": settings, "environment": environment(torch.device(device)), "arms": rows})
    print(summary(rows))


if __name__ == "__main__":
    main()
