"""Tasks generated from a seed: what a recurrent state can track and what it can recall.

    python train.py experiment=synthetic/parity                     ParaGRU; model=mamba2, model=transformer, ... for others
    python -m evals.state_tracking checkpoint=runs/parity           accuracy by length

A task is one dataclass with a `sample` method, listed in TASKS; its fields are the keys of `data.task`.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from data.errors import UserError
from data.fields import nearest, read
from data.synthetic.recall import MQAR, Copying, KeepNth, KHop
from data.synthetic.task import IGNORE, Draws, Task
from data.synthetic.tracking import CycleNavigation, ModularArithmetic, Parity, WordProblem

TASKS: dict[str, type[Task]] = {
    "parity": Parity,
    "cycle_navigation": CycleNavigation,
    "modular_arithmetic": ModularArithmetic,
    "word_problem": WordProblem,
    "mqar": MQAR,
    "khop": KHop,
    "keep_nth": KeepNth,
    "copying": Copying,
}

LARGEST = 1_000_000  # of a task's numbers: a vocabulary is made of them

__all__ = ["IGNORE", "TASKS", "Draws", "Task", "build_task", "to_dict"]


def build_task(mapping: Any) -> Task:
    """The task of a mapping {name: ..., and the task's own fields}. Raises UserError with one sentence for every problem."""
    if not isinstance(mapping, dict) or "name" not in mapping:
        raise UserError(f"data.task needs a name: one of {', '.join(TASKS)}.")
    name = str(mapping["name"])
    if name not in TASKS:
        raise UserError(f"data.task.name is {name!r}; {nearest(name, TASKS, known_as='choose one of')}")
    kind = TASKS[name]
    problems: list[str] = []
    fields = {key: value for key, value in mapping.items() if key != "name"}
    values = read(fields, typing.get_type_hints(kind), "data.task.", problems, exact=True, whose=f" of the task {name}")
    problems += [
        f"data.task.{key} must be at most {LARGEST:,}, not {value:,}."
        for key, value in values.items()
        if isinstance(value, int) and value > LARGEST
    ]
    if not problems:
        task = kind(**values)
        problems = [f"data.task.{problem}" for problem in task.problems()]
        if not problems:
            return task
    raise UserError(problems)


def to_dict(task: Task) -> dict[str, Any]:
    """The mapping that `build_task` reads back, all fields written out."""
    name = next(name for name, kind in TASKS.items() if kind is type(task))
    return {"name": name, **dataclasses.asdict(task)}
