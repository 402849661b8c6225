"""Cures that act on every recurrent state between two chunks: a limit on its norm, or a new beginning.

Each is a context in which the model is cured. They need nothing of the model but `Adapter.replace_states`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evals.adapters.base import Adapter, ItemError
from evals.cures.setting import Setting, acting_after_chunk, acting_on_start, feed_calibration


@contextmanager
def clamp(adapter: Adapter, setting: Setting, q: float = 0.999, p: float = 0.0) -> Iterator[None]:
    """h <- h min(1, p / |h|) for every head after each chunk; the published form does so at every step (p = 0.5 there), which no parallel scan can.

    p = 0 takes the q quantile of the norms met inside T on calibration text, for each layer and head.
    """
    norms: dict[tuple[int, str], list[Tensor]] = {}

    def note(layer: int, name: str, x: Tensor) -> Tensor:
        norms.setdefault((layer, name), []).append(x.flatten(2).norm(dim=-1) if x.ndim > 2 else x.norm(dim=-1))
        return x

    if not p:
        feed_calibration(adapter, setting, lambda state: adapter.replace_states(state, note) and None)
        if not norms:
            raise ItemError(f"{adapter.kind} has no recurrent state to clamp.")
    limits = {key: torch.quantile(torch.cat(parts).double(), q, dim=0) for key, parts in norms.items()}

    def limit(layer: int, name: str, x: Tensor) -> Tensor:
        norm = (x.flatten(2).norm(dim=-1) if x.ndim > 2 else x.norm(dim=-1)).double()
        most = limits[(layer, name)] if not p else torch.full_like(norm, p)
        scale = (most / norm.clamp(min=1e-30)).clamp(max=1.0).to(x.dtype)
        return x * scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim))

    with acting_after_chunk(adapter, lambda state: adapter.replace_states(state, limit)):
        yield


@contextmanager
def restart(adapter: Adapter, setting: Setting, r: float = 0) -> Iterator[None]:
    """Every recurrent state becomes zero each r tokens (0: T), rounded to whole chunks: no memory beyond r, nothing to collapse."""
    every, chunks_read = max(1, round((int(r) or setting.train_length) / setting.chunk)), [0]

    def after(state: Any) -> Any:
        chunks_read[0] += 1
        return state if chunks_read[0] % every else adapter.replace_states(state, lambda layer, name, x: torch.zeros_like(x))

    with acting_after_chunk(adapter, after), acting_on_start(adapter, lambda: chunks_read.__setitem__(0, 0)):
        yield
