"""Which kernels the model of a run takes, where there are several that do the same, and how wide its residual stream is."""

from __future__ import annotations

import torch

from kernels.linear import float8
from models import attend
from training.config.schema import TrainSection


def choose_kernels(train: TrainSection) -> None:
    """For all models of this process."""
    attend.own_kernels = train.packed_attention
    float8.wanted = train.fp8
    float8.begin_step(0)


def residual_dtype(train: TrainSection) -> torch.dtype | None:
    """Of the residual stream in training, None where it is the embedding's (models.lm.LanguageModel)."""
    return torch.bfloat16 if train.residual == "bf16" else None
