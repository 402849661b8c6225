"""A layer whose plan has seen corrections fail, for tests of composed maps."""

from __future__ import annotations

import torch

from kernels.dense_rnn import plans
from kernels.dense_rnn.maps import Maps
from kernels.parallel_rnn.cell import Cell


def failed(layer: plans.Layer) -> None:
    """All is walked in order, as every slice of the choice before was."""
    states = layer.passes[0]
    states.halvings, states.burn_in, states.reckoned, states.T = plans.HALVINGS, 0, 4, 256
    states.seen = {(0, 0): (6.0, 1.0, 0), (plans.HALVINGS, 0): (0.0, 0.0, 0)}


class Walked:
    """Plans of one layer that walks all in order because corrections failed."""

    def __init__(self, cell: Cell, ranks: int, failing: bool = True, device: str = "cpu") -> None:
        self.cell, self.ranks, self.plans = cell, ranks, plans.Plans(1, torch.device(device))
        if failing:
            failed(self.layer)

    @property
    def layer(self) -> plans.Layer:
        return self.plans.layers[0]

    @property
    def maps(self) -> Maps:
        return self.layer.maps

    def words(self) -> list[float]:
        self.plans.collect()
        return self.plans.words()

    def decide(self) -> bool:
        """A choice, after one step where a run takes some."""
        self.plans.steps = plans.PERIOD - 1
        return self.plans.decide(self.words(), self.ranks)
