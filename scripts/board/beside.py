"""What several cells of a row make together on one device, each a graph on a stream of its own: is it more than one after the other?

    python -m scripts.board beside data=DIR rows=transformer,dense_lstm streams=3

Writes OUT/beside.json: by row, training tokens/s of 1, 2, ... cells together, kernels compiled and steps captured before. `run streams=N` is what does it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from data.files import write_json
from scripts.board.plan import Plan
from scripts.board.repeat import repeatable, source_hash
from scripts.board.work import TURN

BURSTS = 2  # of each number of cells; the quicker one is told


def _advance(learner: Any, steps: int) -> None:
    for _ in learner.advance(learner.done + steps):
        pass


def together(plan: Plan, row: str, most: int, device: Any) -> list[float]:
    """Tokens/s of 1, 2, ..., `most` cells of a row together, in bursts of the speed cell's steps."""
    from scripts.board.learner import Learner
    from scripts.studies.graphed import WARMUP

    settings = plan.speed(row).settings
    steps = -(-settings["burst"] // TURN) * TURN
    learners = [Learner(settings | {"seed": seed}, plan.data, device) for seed in range(most)]
    for learner in learners:
        _advance(learner, WARMUP + 3)  # as written, then captured
        learner.mean_loss(1)
    rates = []
    for count in range(1, most + 1):
        seconds = []
        for _ in range(BURSTS):
            start = time.perf_counter()
            for _ in range(0, steps, TURN):
                for learner in learners[:count]:
                    _advance(learner, TURN)
            for learner in learners[:count]:
                learner.mean_loss(steps)  # waits for its stream
            seconds.append(time.perf_counter() - start)
        rates.append(count * steps * settings["rows"] * settings["T"] / min(seconds))
    return rates


def beside(values: dict[str, Any]) -> dict[str, Any]:
    """OUT/beside.json of the rows asked for; told as well."""
    import torch

    from scripts.board.queue import make_plan
    from training.watch.metrics import environment

    device, plan = repeatable(values["gpu"], values["device"]), make_plan(values)
    found: dict[str, Any] = {"rows": {}, "environment": environment(device) | {"code": source_hash()}}
    for row in values["rows"]:
        rates = together(plan, row, max(2, values["streams"]), device)
        found["rows"][row] = rates
        ratios = ", ".join(f"{n} {rate:,.0f} ({rate / rates[0]:.2f})" for n, rate in enumerate(rates, 1))
        print(f"{row}: tokens/s of so many cells together (over one alone): {ratios}", flush=True)
        write_json(Path(values["out"]) / "beside.json", found)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found
