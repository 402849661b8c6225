"""A Saver without a run around it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from training.config.schema import CheckpointSection
from training.saving.saver import Saver
from training.world import World


class Alone(World):
    def __init__(self) -> None:
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")


def saver_of(run: Path, start: int = 0, begun: Path | None = None, **settings: Any) -> tuple[Saver, list[str]]:
    """A Saver over one parameter of five numbers whose checkpoints are all it does."""
    parameter = torch.nn.Parameter(torch.arange(5.0))
    engine: Any = SimpleNamespace(world=Alone(), stage=0, parameters={"w": parameter}, matrices={}, optimizer_steps=lambda: 0)
    said: list[str] = []
    return Saver(run, engine, CheckpointSection(**settings), {"config.json": "{}"}, said.append, saved=start, begun=begun), said
