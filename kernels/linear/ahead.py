"""Casts of weights ahead of a recorded pass: the recording finds them in memory of their own, and one launch before each replay makes them all. One by
one, between the products, they are a hundred launches of some microseconds.

That memory is the first that a recording asks for, and it is never given back: what a pass frees, its recording hands out again, so that memory
asked for where a weight is first read would be written over by what comes before it in the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WHOLE = 64  # elements that the place of a cast is a multiple of
_recorded: Casts | None = None


def room_of(module: nn.Module) -> int:
    """Elements that the casts of a module's products may take."""
    weights = {layer.weight for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32}
    return sum(-(-weight.numel() // WHOLE) * WHOLE for weight in weights)


class Casts:
    """What the passes recorded within `recording` have cast, to one dtype. Weights are read again, where they lay then, at every `run`."""

    def __init__(self) -> None:
        self.made: dict[tuple[tuple[int, torch.Size], ...], tuple[Sequence[Tensor], Tensor]] = {}
        self.memory: Tensor | None = None
        self.used = 0
        self.table: Any = None

    @contextmanager
    def recording(self, room: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Around a pass as it is recorded, before which the recording has asked for no memory. room: elements of all casts."""
        global _recorded
        if self.memory is None:
            self.memory = torch.empty(room, dtype=dtype, device=device)
        before, _recorded = _recorded, self
        try:
            yield
        finally:
            _recorded = before

    def forget(self) -> None:
        self.made.clear()
        self.memory, self.used, self.table = None, 0, None

    def take(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """The weights' rows one below the other in `dtype`, as from the next `run` on. None where there is no room for them, or not of this dtype."""
        key = tuple((w.data_ptr(), w.shape) for w in weights)
        if key not in self.made:
            size = sum(w.numel() for w in weights)
            if self.memory is None or dtype != self.memory.dtype or self.used + size > self.memory.numel():
                return None
            joined = self.memory[self.used : self.used + size].view(-1, *weights[0].shape[1:])
            self.made[key], self.table = ([w.detach() for w in weights], joined), None
            self.used += -(-size // WHOLE) * WHOLE
        return self.made[key][1] if self.made[key][1].dtype == dtype else None

    def run(self) -> None:
        """Casts all weights, in one launch."""
        if not self.made:
            return
        from kernels.linear import triton

        assert self.memory is not None
        with torch.cuda.device_of(self.memory):  # Triton launches on the current device
            if self.table is None:
                made = self.made.values()
                pairs = [pair for weights, joined in made for pair in zip(weights, joined.split([w.shape[0] for w in weights]))]
                self.table = triton.table(pairs)
            triton.cast_all(*self.table)


def recorded() -> Casts | None:
    """Those of the pass that is being recorded, if one is."""
    return _recorded
