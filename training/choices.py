"""Which kernels the model of a run takes, where there are several that do the same."""

from __future__ import annotations

from kernels.linear import float8
from models import attend
from training.config.schema import TrainSection


def choose_kernels(train: TrainSection) -> None:
    """For all models of this process."""
    attend.own_kernels = train.packed_attention
    float8.wanted = train.fp8
    float8.begin_step(0)
