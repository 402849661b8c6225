"""Decoding at speed: weights in the precision of inference."""

from __future__ import annotations

import torch

from models.init import roles
from models.lm import LanguageModel


def cast(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model's weights in `dtype`, in place; what must stay fp32 (the recurrences' own parameters) does."""
    for parameter in model.parameters():
        if "keep_fp32" not in roles(parameter):
            parameter.data = parameter.data.to(dtype)
    return model
