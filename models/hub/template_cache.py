"""The cache of an exported folder: the states of all layers, from which tokens can be taken back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


def each(change: Any, value: Any) -> Any:
    """`value` with `change` applied to every tensor in it (lists, dataclasses)."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return [each(change, v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]  # others are made again when they are missed
        return dataclasses.replace(value, **{name: each(change, getattr(value, name)) for name in fields})
    return value


class EverywhenCache(Cache):
    """The states of all layers after the tokens seen. To take tokens back, which a recurrent state cannot, the states at an earlier place
    are kept with the tokens since, and those are read again."""

    is_compileable = False
    is_croppable = True
    is_initialized = True
    is_linear = [False]
    is_sliding = [False]

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        self.states: Any = None
        self.seen = 0
        self.anchor: Any = None
        self.anchor_seen = 0
        self.since: list[Any] = []  # [ids or None, segments] of each call since the anchor
        self.pending: Any = None  # [ids, segments] to be read before anything else

    def __len__(self) -> int:
        return 0 if self.states is None else len(self.states)

    @property
    def batch_size(self) -> int:
        return 0 if not self.since else int(self.since[0][1].shape[0])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """The past is always recorded."""

    def crop(self, tokens: int) -> None:
        """Removes the last -tokens tokens; a positive number is how many tokens stay."""
        target = self.seen + tokens if tokens <= 0 else min(tokens, self.seen)
        if target == self.seen:
            return
        if target < self.anchor_seen or any(piece[0] is None for piece in self.since):
            raise ValueError("These tokens can no longer be taken back from the cache.")
        ids, segments = (torch.cat(parts, 1)[:, : target - self.anchor_seen] for parts in zip(*self.since))
        self.states, self.seen, self.since = self.anchor, target, []
        self.pending = [ids, segments] if ids.shape[1] else None

    def _change(self, change: Any) -> None:
        self.states, self.anchor, self.since, self.pending = (each(change, v) for v in (self.states, self.anchor, self.since, self.pending))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])
