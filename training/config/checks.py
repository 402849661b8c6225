"""Checks of a run's settings against each other that need nothing but the settings: lengths within the run, and where its data lie."""

from __future__ import annotations

import math
import os
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.config.schema import Config

NO_DATA = "data.path is not given; write data.path=FOLDER with a folder that python -m data.prepare has made."


def lengths(config: Config) -> list[str]:
    """Stretches that are longer than the run they lie in. Raises nothing where the run's own length is unclear."""
    t, s = config.train, config.schedule
    if (t.steps is None) == (t.tokens is None):
        return []
    total, warmup, decay = config.total_steps, config.in_steps(s.warmup), config.in_steps(s.decay)
    run = f"the {total:,} step{'s' if total > 1 else ''} of the run"
    below = f" (a number below 1 is a fraction of the run, else it counts {s.unit})"
    if warmup > total:
        return [
            f"schedule.warmup {s.warmup:,g} is {warmup:,} steps, longer than {run}: its rate would never be reached; shorten it{below}."
        ]
    if s.kind == "wsd" and decay > total:
        return [f"schedule.decay {s.decay:,g} is {decay:,} steps, longer than {run}; shorten it{below}."]
    if s.kind == "wsd" and warmup + decay > total:
        return [f"schedule.warmup and schedule.decay take {warmup:,} + {decay:,} steps, more than {run}; shorten one{below}."]
    if config.profile and config.profile_start > total and not config.dry_run:
        return [f"profile=true would trace from step {config.profile_start:,} on, after {run}; lower profile_start."]
    return []


def notes(config: Config) -> list[str]:
    """What is allowed but will not happen in a run of this length, a sentence each."""
    total = config.total_steps - config.at.first_step
    rows = {"checkpoint.every": config.checkpoint.every, "eval.every": config.eval.every, "eval.sample_every": config.eval.sample_every}
    found = [f"{key}={value:,} is longer than the run of {total:,} steps: only at the end" for key, value in rows.items() if value > total]
    late = [step for step in config.checkpoint.milestones if step > config.total_steps]
    if late:
        found.append(f"checkpoint.milestones holds {late[0]:,}, after the last step {config.total_steps:,}")
    samples = (config.total_steps - config.at.step) * config.train.global_batch
    if config.data.reader == "synthetic" and config.data.curriculum >= samples > 0:
        found.append(
            f"data.curriculum={config.data.curriculum:,} is longer than the run of {samples:,} sequences: none has the full length"
        )
    return found


def at_home(config: Config) -> None:
    """Replaces a leading ~ of paths, which shells leave alone inside a word."""
    home = os.path.expanduser
    config.run_dir, config.train.resume = home(config.run_dir), home(config.train.resume)
    config.train.start_from = config.train.start_from and home(config.train.start_from)
    config.deepspeed.nvme_path = config.deepspeed.nvme_path and home(config.deepspeed.nvme_path)
    if isinstance(config.data.path, dict):
        config.data.path = {home(str(folder)): weight for folder, weight in config.data.path.items()}
    elif isinstance(config.data.path, (str, int, float)):
        config.data.path = home(str(config.data.path))


def _mixture(folders: list[str]) -> str:
    """What to write in the place of a list of folders."""
    if len(folders) < 2:
        return f"data.path takes a folder, not a list; write {shlex.quote('data.path=' + ''.join(folders))}."
    shares = ", ".join(f"{folder}: {1 / len(folders):.2g}" for folder in folders)
    return f"data.path takes one folder, or several with their weights; write {shlex.quote(f'data.path={{{shares}}}')}."


def data(config: Config) -> list[str]:
    """What is wrong with the form of data.path, whatever lies there."""
    if isinstance(config.data.path, (list, tuple)):
        return [_mixture(list(map(str, config.data.path)))]
    if isinstance(config.data.path, dict) and config.data.path:
        wrong = {folder: weight for folder, weight in config.data.path.items() if not _weight(weight)}
        found = [f"data.path: the weight of {folder} must be a number of zero or more, not {weight!r}." for folder, weight in wrong.items()]
        nothing = not wrong and not any(config.data.path.values())
        return found + (["data.path gives every folder the weight 0; give one of them more."] if nothing else [])
    return [] if config.data.path or config.dry_run else [NO_DATA]


def _weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
