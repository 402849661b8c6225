"""What training does with checkpoints beyond reading a model (models/checkpoint.py, whose names can be had here too): the ranks agree on one, and the
optimizer and the random state go on from it. training/saving/saver.py writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from models.checkpoint import (
    MARKER,
    checkpoints,
    digest,
    find,
    find_and_read,
    folder_of,
    load_model,
    load_weights,
    newest,
    order_of,
    read_state,
    step_of,
    verify,
)
from models.hub.weights import Weights
from training.engine import Engine
from training.world import World
from training.zero.local_state import load_moments

__all__ = [
    "MARKER", "checkpoints", "digest", "find", "find_and_read", "folder_of", "load_model", "load_weights", "newest", "newest_together", "order_of",
    "read_state", "restore_optimizer", "step_of", "verify",
]  # fmt: skip


def newest_together(run_dir: Path, world: World, warn: Callable[[str], Any] = print) -> Path | None:
    """`newest` for all ranks at once: rank 0 lists the checkpoints, as ranks may see a shared disk at different moments, and each reads
    a part of the files. Whoever finds damage says so."""
    tried: set[int] = set()
    while True:
        candidates = [step for step in map(step_of, checkpoints(run_dir)) if step not in tried] if world.main else []
        step = int(world.sum([(candidates or [-1])[-1] if world.main else 0.0])[0])
        if step < 0:
            return None
        tried.add(step)
        folder = folder_of(run_dir, step)
        problem = verify(folder, world.rank, world.size)
        if problem:
            warn(f"passing over a damaged checkpoint: {problem}")
        if not world.any(bool(problem)):
            return folder


def restore_optimizer(folder: Path, engine: Engine) -> None:
    """The optimizer's moments, what solves have learnt, and the random state; weights were loaded before the engine was made."""
    state = read_state(folder)
    if engine.plans is not None and "plans" in state:
        engine.plans.load(state["plans"])
    if state["optimizer_steps"]:
        load_moments(engine, Weights(folder, "optimizer").stretch, state["optimizer_steps"])
    rng = load_file(folder / "rng.safetensors")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and engine.world.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], engine.world.device)
