"""Plans of dense heads as training would have learnt them, for benches: kernels/dense_rnn/plans.py says what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.dense_rnn import launch
from kernels.dense_rnn.launch import Plan
from kernels.dense_rnn.plans import WORDS, Plans
from kernels.parallel_rnn.cell import Cell


def settle(plans: Plans, step: Callable[[], Any], choices: int) -> None:
    """Takes `step` so many times, and chooses after each; at the end the best of what was seen is in force, as the last choice may be a trial."""
    ones = [one for layer in plans.layers for one in layer.passes]
    for _ in range(choices):
        step()
        plans.collect()
        if plans.counters.is_cuda:
            torch.cuda.synchronize()
        words = plans.words()
        for i, one in enumerate(ones):
            corrections, walked, slices = words[WORDS * i : WORDS * (i + 1)]
            one.add(corrections, walked, slices, 1)
            one.decide()
    for one in ones:
        if one.seen:
            one.halvings, one.burn_in = min(one.seen, key=one.expected)


def settled_model(model: nn.Module, step: Callable[[], Any], device: torch.device, choices: int = 8) -> None:
    """Has the layers of a model whose heads are dense learn from so many steps, if there are any; the plans stay with it."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "recurrence", "") == "dense_rnn"]
    if layers:
        plans = Plans(len(layers), device)
        for layer, learns in zip(layers, plans.layers):
            layer.learner = learns.number
        settle(plans, step, choices)
        model.__dict__["plans"] = plans  # a layer finds its own by number for as long as they live


def learnt(cell: Cell, given: list[Tensor], d_emitted: Tensor, choices: int = 20) -> tuple[Plan, Plan]:
    """The plans, forwards and backwards, that a layer of these [pre, rec, mat, h0] settles on."""
    plans, d_final = Plans(1, given[0].device), torch.zeros_like(given[3])
    layer = plans.layers[0]

    def step() -> None:
        emitted, kept, _ = launch.forward(cell, *(*given, None, None, layer))
        launch.backward(cell, *(*given, None, emitted, kept, d_emitted, None, d_final, None, layer))

    settle(plans, step, choices)
    K = given[2].shape[1]
    return launch.in_force(cell, given[0], K, layer, False), launch.in_force(cell, given[0], K, layer, True)
