"""What a cure may depend on, and the two places of an evaluation where it may act: between chunks, and where a sequence begins.

Legend: R rows, T tokens of a training sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evals.adapters.base import Adapter


@dataclass
class Setting:
    """The evaluation that a cure is for; lengths in tokens."""

    train_length: int  # T
    total_length: int  # of the text to come
    calibration_RT: np.ndarray  # ids of text that a cure may measure the model on
    chunk: int  # tokens fed at once


def feed_calibration(adapter: Adapter, setting: Setting, each: Callable[[Any], None] | None = None) -> None:
    """Feeds the calibration rows in chunks; each(state) after every chunk."""
    ids = torch.from_numpy(setting.calibration_RT[:, : setting.train_length])
    state = adapter.start(ids.shape[0])
    for a in range(0, ids.shape[1], setting.chunk):
        state = adapter.advance(ids[:, a : a + setting.chunk], state)
        if each is not None:
            each(state)


@contextmanager
def acting_after_chunk(adapter: Adapter, act: Callable[[Any], Any]) -> Iterator[None]:
    """The context in which act(state) gives the state that goes on to the next chunk."""
    before = adapter.after_chunk
    adapter.after_chunk = act
    try:
        yield
    finally:
        adapter.after_chunk = before


@contextmanager
def acting_on_start(adapter: Adapter, act: Callable[[], Any]) -> Iterator[None]:
    """The context in which act() is called where a new sequence begins."""
    before = adapter.on_start
    adapter.on_start = act
    try:
        yield
    finally:
        adapter.on_start = before
