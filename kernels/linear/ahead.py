"""Casts of weights ahead of a recorded pass: the recording finds them in memory of their own, and one launch before each replay makes them all. One by
one, between the products, they are a hundred launches of some microseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Key = tuple[torch.dtype, tuple[int, ...]]
_recorded: Casts | None = None


class Casts:
    """What the passes recorded within `recording` have cast. Weights are read again, where they lay then, at every `run`."""

    def __init__(self) -> None:
        self.made: dict[Key, tuple[Sequence[Tensor], Tensor]] = {}
        self.table: Any = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        global _recorded
        before, _recorded = _recorded, self
        try:
            yield
        finally:
            _recorded = before

    def forget(self) -> None:
        self.made.clear()
        self.table = None

    def take(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weights' rows one below the other in `dtype`, as from the next `run` on."""
        key = dtype, tuple(w.data_ptr() for w in weights)
        if key not in self.made:
            rows = sum(w.shape[0] for w in weights)
            self.made[key] = [w.detach() for w in weights], weights[0].new_empty(rows, *weights[0].shape[1:], dtype=dtype)
            self.table = None
        return self.made[key][1]

    def run(self) -> None:
        """Casts all weights, in one launch for each dtype."""
        if not self.made:
            return
        from kernels.linear import triton

        with torch.cuda.device_of(next(iter(self.made.values()))[1]):  # Triton launches on the current device
            if self.table is None:
                self.table = [triton.table(of_dtype) for of_dtype in self._by_dtype()]
            for table in self.table:
                triton.cast_all(*table)

    def _by_dtype(self) -> list[list[tuple[Tensor, Tensor]]]:
        pairs: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for weights, joined in self.made.values():
            pieces = joined.split([w.shape[0] for w in weights])
            pairs.setdefault(joined.dtype, []).extend(zip(weights, pieces))
        return list(pairs.values())


def recorded() -> Casts | None:
    """Those of the pass that is being recorded, if one is."""
    return _recorded
