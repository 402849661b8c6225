"""What roundings alone do to a cell's loop: the same loop, its functions rounded in other ways. Bounds of generated cells come from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kernels.parallel_rnn import reference
from kernels.parallel_rnn.cell import Cell


def walked(cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None) -> Tensor:
    """States (B, T, S, D), one step after the other."""
    h, steps = h0, []
    for t in range(pre.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        h = torch.stack(cell(pre[:, t].unbind(1), rec.unbind(0), h.unbind(1)), 1)
        steps.append(h)
    return torch.stack(steps, 1)


def worst(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Largest |a - b| a channel, over what is masked."""
    gap = torch.where(mask, (a - b).abs(), torch.zeros_like(a))
    return gap.flatten(0, -2).amax(0)


class Nudged(TorchFunctionMode):
    """The last digit of every function's value is drawn anew."""

    FUNCTIONS = frozenset(
        ("tanh", "sigmoid", "exp", "exp2", "expm1", "log", "log1p", "sin", "cos", "erf", "sqrt", "rsqrt", "softplus", "pow")
    )

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in self.FUNCTIONS:
            return value
        return value * (1 + torch.finfo(value.dtype).eps * torch.randint(-1, 2, value.shape, generator=self.generator))


def most_lost(cell: Cell, inputs: tuple[Any, ...], exact: Tensor, mask: Tensor, count: int = 8) -> Tensor:
    """Largest error a channel of so many fp32 loops whose functions are rounded in other ways."""
    lost = []
    for seed in range(count):
        with Nudged(seed):
            lost.append(worst(walked(cell, inputs[0], inputs[1], inputs[2], inputs[3]).double(), exact, mask))
    return torch.stack(lost).nan_to_num(nan=0.0, posinf=0.0).amax(0)


def other_draws(
    cell: Cell, inputs: tuple[Any, ...], cotangents: tuple[Tensor, Tensor], states: Tensor, count: int = 8
) -> list[tuple[Tensor, ...]]:
    """Gradients of pre, rec and h0 in fp32 whose functions are rounded in so many other ways. One loop may have had a lucky draw: 1 - y^2 of a
    saturated tanh is 1e-5 with an error of 1e-7, or of none."""
    pre, rec, h0, starts = inputs
    found = []
    for seed in range(count):
        with Nudged(seed):
            found.append(reference.linear_backward(cell, pre, rec, h0, starts, states.float(), *cotangents, 1))
    return found
