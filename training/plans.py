"""Plans of recurrences with dense heads, learnt in training: kernels/dense_rnn/plans.py says what is learnt and how.

Counts of a step begin their way to the host behind its passes, are there when the engine has waited for the loss, go through the step's one sum
over ranks, and settle the plans of the steps that follow. They are part of every checkpoint's state.json.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kernels.dense_rnn.plans import Plans
from training.world import World


def plans_of(model: nn.Module, world: World) -> Plans | None:
    """Has the layers of `model` whose heads are dense learn; None where there is none."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "recurrence", "") == "dense_rnn"]
    if not layers:
        return None
    plans = Plans(len(layers), world.device)
    for layer, learns in zip(layers, plans.layers):
        layer.learner = learns.number
    return plans
