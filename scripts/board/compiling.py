"""Compiles the kernels of rows before their first cells, each row in a process of its own: on a machine of many cores all of them in the time of the slowest.

    python -m scripts.board compile data=DIR rows=gdn,mamba2

A model of each row takes a few steps at the board's shapes, is read as a finished cell is, and is thrown away; what stays is Triton's cache.
"""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

from scripts.board.plan import Plan
from scripts.board.repeat import repeatable
from scripts.studies.workers import end_with_parent
from training.errors import UserError

STEPS = 5  # three as written, the capture, a replay


def compile_row(row: str, values: dict[str, Any], number: int = 0) -> float:
    """Seconds that it took on GPU `number`, over all GPUs in turn."""
    from scripts.board.learner import Learner
    from scripts.board.measure import everything

    end_with_parent()
    start, device = time.perf_counter(), repeatable(number, values["device"])
    plan = Plan(values["size"], values["data"], [row], values["precision"])
    settings = plan.text("compile", row, plan.board.tokens, plan.board.grid_span, plan.board.rates[0], 0).settings
    learner = Learner(settings, values["data"], device)
    for _ in learner.advance(STEPS):
        pass
    learner.mean_loss(STEPS)  # waits for the device
    with learner.trainer.here():
        everything(learner.model, values["data"], settings, full=True)
    took = time.perf_counter() - start
    print(f"{row}: {took:.0f} s", flush=True)
    return took


def compile_all(values: dict[str, Any]) -> None:
    """`compile_row` of all rows asked for, at once. Raises UserError where one failed."""
    from scripts.board.queue import make_plan

    make_plan(values)  # whether there is such a size, and shards of it
    spawn = multiprocessing.get_context("spawn")
    processes = {row: spawn.Process(target=compile_row, args=(row, values, number)) for number, row in enumerate(values["rows"])}
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join()
    if failed := [row for row, process in processes.items() if process.exitcode]:
        raise UserError(f"No kernels were compiled for {', '.join(failed)}; run them alone, with rows={failed[0]}, to see why.")
