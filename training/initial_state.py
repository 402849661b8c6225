"""Where training sequences start: from an empty state, from the one the last batch ended in, or from noise.

A recurrent model trained from empty states only never meets the states that long texts lead to, and fails there; starting from other states
in training is the cheapest cure known (Buitrago and Gu, arXiv 2507.02782):

* pass: the final state of the previous batch in the same place, without gradient. With windows (data.reader=windows) that is state passing,
  the text being unrelated; with data.reader=stream the text goes on and it is truncated back-propagation through time.
* random: N(0, sigma^2) in every recurrent entry.
* fitted: N(mean, std^2) of the final states met in training, for each layer and head (a running average over steps).

With probability `drop` a row starts from the empty state, so that it stays known. Caches of attention always start empty. States are not
part of checkpoints: a resumed run starts them anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from training.config.schema import STARTS

MODES = STARTS
CACHES = ("k_", "v_")  # fields of attention's state


def _tensors(part: Any) -> list[str]:
    return [
        f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), Tensor) and getattr(part, f.name).is_floating_point()
    ]


def _recurrent(part: Any) -> list[str]:
    """Fields that carry a memory of their own, the last inputs of a convolution left out."""
    return [name for name in _tensors(part) if not name.startswith(("conv", *CACHES))]


class InitialStates:
    """Gives each micro-batch its state and takes the one it ends in. `slot` is the place of a micro-batch in its step."""

    def __init__(self, mode: str, sigma: float = 1.0, drop: float = 0.1, seed: int = 0, momentum: float = 0.99) -> None:
        if mode not in MODES:
            raise ValueError(f"The initial state is {mode!r}; choose one of {', '.join(MODES)}.")
        if not 0 <= drop <= 1 or sigma < 0:
            raise ValueError(f"drop must lie between 0 and 1 and sigma be zero or more, not {drop} and {sigma}.")
        self.mode, self.sigma, self.drop, self.momentum = mode, sigma, drop, momentum
        self.generator = torch.Generator().manual_seed(seed)
        self.held: dict[int, Any] = {}
        self.fitted: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def before(self, model: Any, slot: int, batch: int, segment_ids: Tensor | None = None, stream: bool = False) -> Any:
        """The LMState to begin with, or None (zero). stream: the rows go on with their text, so a document that ended stays ended;
        otherwise the state counts as of the row's first segment."""
        if self.mode == "zero":
            return None
        state = model.init_state(batch)
        if self.mode == "pass":
            held = self.held.get(slot)
            if held is None or next(_batches(held), batch) != batch:
                return state
            state = held
        keep_B = (torch.rand(batch, generator=self.generator) >= self.drop).to(model.embedding.weight.device)
        layers = []
        for layer, part in enumerate(state.layers):
            values: dict[str, Any] = {}
            for name in _recurrent(part) if self.mode != "pass" else [n for n in _tensors(part) if not n.startswith(CACHES)]:
                x = getattr(part, name)
                if self.mode != "pass":
                    x = self._noise(layer, name, x)
                values[name] = torch.where(keep_B.view(-1, *[1] * (x.ndim - 1)), x, 0.0)  # a dropped state is gone, NaN or not
            if hasattr(part, "segment_B"):
                first = part.segment_B if stream else torch.zeros_like(part.segment_B) if segment_ids is None else segment_ids[:, 0]
                values["segment_B"] = first.to(part.segment_B.dtype)
            if any(name.startswith(CACHES) for name in _tensors(part)):
                layers.append(model.blocks[layer].mixer.init_state(batch, model.embedding.weight.device))
            else:
                layers.append(dataclasses.replace(part, **values))
        return type(state)(layers)

    def _noise(self, layer: int, name: str, x: Tensor) -> Tensor:
        draw = torch.randn(x.shape, generator=self.generator).to(x)
        if self.mode == "random":
            return self.sigma * draw
        if (layer, name) not in self.fitted:
            return torch.zeros_like(x)
        mean, std = self.fitted[(layer, name)]
        return mean.to(x) + std.to(x) * draw

    def after(self, slot: int, state: Any) -> None:
        """Takes the state a micro-batch ended in."""
        if self.mode == "pass":
            self.held[slot] = type(state)([_detached(part) for part in state.layers])
        elif self.mode == "fitted":
            for layer, part in enumerate(state.layers):
                for name in _recurrent(part):
                    self._fit(layer, name, getattr(part, name).detach())

    def _fit(self, layer: int, name: str, x: Tensor) -> None:
        """Mean and standard deviation over rows and the entries of a head; a state without heads (B, S, I) has one pair for each of the S."""
        over = (0, *range(2, x.ndim))
        mean, std = x.mean(over, keepdim=True), x.std(over, keepdim=True)
        before = self.fitted.get((layer, name))
        if before is not None:
            mean, std = (self.momentum * b + (1 - self.momentum) * a for b, a in zip(before, (mean, std)))
        self.fitted[(layer, name)] = (mean, std)


def _batches(state: Any) -> Any:
    for part in state.layers:
        for name in _tensors(part):
            if not name.startswith(CACHES):
                yield getattr(part, name).shape[0]


def _detached(part: Any) -> Any:
    return dataclasses.replace(part, **{name: getattr(part, name).detach() for name in _tensors(part)})
