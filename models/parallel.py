"""Sequence parallelism: time cut into equal slices, one on each rank of a process group.

`with split(model, group):` gives every mixer a `Slice` (models/slices.py), which its forward asks for what lies before its own tokens.
Recurrences exchange border values only, whatever the length, and each rank then runs its ordinary kernel once with the right start; in the
backward pass the adjoint of a slice's final state comes from the right in the same way. Attention swaps time for heads (Ulysses) where the
heads divide, needs a halo only under a window, and else gathers keys and values. Each mixer's exchange is in its own file, `over_ranks`.
Gradients of parameters are those of this rank's slice: sum them over the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from models.contract import SequenceMixer
from models.slices import Slice, traffic

__all__ = ["split", "traffic"]


@contextmanager
def split(model: nn.Module, group: Any = None) -> Iterator[None]:
    """Inside, calls of `model` without a state are slices of time: rank n of `group` (None: all ranks) holds the n-th.

    The backward pass belongs inside too. Raises ValueError for a mixer that cannot be split.
    """
    parts = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    reasons = [reason for part in parts if (reason := part.why_not_split())]
    if reasons:
        raise ValueError(f"Time cannot be split over ranks: {reasons[0]}.")
    slice_ = Slice(group)
    try:
        for part in parts:
            part.slice = slice_
        yield
    finally:
        for part in parts:
            part.slice = None
