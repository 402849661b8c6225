"""Where training sequences start: from an empty state, from the one the last batch ended in, or from noise.

A recurrent model trained from empty states only never meets the states that long texts lead to, and fails there; starting from other states
in training is the cheapest cure known (Buitrago and Gu, arXiv 2507.02782):

* pass: the final state of the previous batch in the same place, without gradient. With windows (data.reader=windows) that is state passing,
  the text being unrelated; with data.reader=stream the text goes on and it is truncated back-propagation through time.
* random: N(0, sigma^2) in every recurrent entry.
* fitted: N(mean, std^2) of the final states met in training, for each layer and head (a running average over steps).

With probability `drop` a row starts from the empty state, so that it stays known, and so does a row whose state is not finite, as one of a step that
was left out: passed on, it would be every later step's. Caches of attention always start empty. What is drawn follows from the seed, the rank and the
step; states, and the averages of fitted ones, are not part of checkpoints: a resumed run starts them anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from models.contract import SequenceMixer, state_tensors, with_tensors
from training.config.schema import STARTS

MODES = STARTS


class InitialStates:
    """Gives each micro-batch its state and takes the one it ends in. `slot` is the place of a micro-batch in its step."""

    def __init__(self, mode: str, sigma: float = 1.0, drop: float = 0.1, seed: int = 0, momentum: float = 0.99) -> None:
        if mode not in MODES:
            raise ValueError(f"The initial state is {mode!r}; choose one of {', '.join(MODES)}.")
        if not 0 <= drop <= 1 or sigma < 0:
            raise ValueError(f"drop must lie between 0 and 1 and sigma be zero or more, not {drop} and {sigma}.")
        self.mode, self.sigma, self.drop, self.momentum = mode, sigma, drop, momentum
        self.seed, self.generator = seed, torch.Generator().manual_seed(seed)
        self.mixers: list[SequenceMixer] = []
        self.ended: dict[int, Any] = {}  # the state in which each micro-batch of the step before ended
        self.fitted: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def begin_step(self, step: int) -> None:
        """To be called before the training step that follows `step` steps: what it draws depends on nothing else."""
        self.generator.manual_seed((self.seed * 1_000_003 + step) % (1 << 63))

    def before(self, model: Any, slot: int, batch: int, segment_ids: Tensor | None = None, stream: bool = False) -> Any:
        """The LMState to begin with, or None (zero). stream: the rows go on with their text, so a document that ended stays ended;
        otherwise the state counts as of the row's first segment."""
        if self.mode == "zero":
            return None
        self.mixers = [block.mixer for block in model.visits()]
        state = model.init_state(batch)
        if self.mode == "pass":
            ended = self.ended.get(slot)
            if ended is None or self._rows(ended) not in (batch, None):
                return state
            state = ended
        keep_B = (torch.rand(batch, generator=self.generator) >= self.drop).to(model.embedding.weight.device)
        for mixer, part in zip(self.mixers, state.layers) if self.mode == "pass" else ():
            for x in () if mixer.grows() else mixer.tensors_of(part, "recurrent", "history").values():
                keep_B = keep_B & x.isfinite().flatten(1).all(1)
        layers = []
        for layer, (mixer, part) in enumerate(zip(self.mixers, state.layers)):
            if mixer.grows():
                layers.append(mixer.init_state(batch, model.embedding.weight.device))
                continue
            values = mixer.tensors_of(part, "recurrent", "history") if self.mode == "pass" else mixer.tensors_of(part, "recurrent")
            for name, x in values.items():
                if self.mode != "pass":
                    x = self._noise(layer, name, x)
                # No product with zero: a NaN in a dropped state must not spread.
                values[name] = torch.where(keep_B.view(-1, *[1] * (x.ndim - 1)), x, 0.0)
            part = dataclasses.replace(part, **values)
            if not stream:
                part = mixer.in_segment(part, keep_B.new_zeros(batch, dtype=torch.int32) if segment_ids is None else segment_ids[:, 0])
            layers.append(part)
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
            self.ended[slot] = type(state)([with_tensors(part, Tensor.detach) for part in state.layers])
        elif self.mode == "fitted":
            for layer, (mixer, part) in enumerate(zip(self.mixers, state.layers)):
                for name, tensor in mixer.tensors_of(part, "recurrent").items():
                    self._fit(layer, name, tensor.detach())

    def _rows(self, state: Any) -> int | None:
        """How many rows the state has; None where every layer is one with a cache, which always starts empty."""
        parts = (part for mixer, part in zip(self.mixers, state.layers) if not mixer.grows())
        return next((len(tensor) for part in parts for tensor in state_tensors(part).values()), None)

    def _fit(self, layer: int, name: str, x: Tensor) -> None:
        """Mean and standard deviation over rows and the entries of a head; (B, S, I) of a cell has one pair for each of the S, (B, D) one in all. What
        is not finite counts for nothing."""
        over = (0, *range(min(2, x.ndim - 1), x.ndim))
        mean, std = x.mean(over, keepdim=True), x.std(over, keepdim=True)
        fine, before = mean.isfinite() & std.isfinite(), self.fitted.get((layer, name))
        if before is not None:
            mean, std = (self.momentum * b + (1 - self.momentum) * a for b, a in zip(before, (mean, std)))
        kept_mean, kept_std = before or (torch.zeros_like(mean), torch.zeros_like(std))
        self.fitted[(layer, name)] = (torch.where(fine, mean, kept_mean), torch.where(fine, std, kept_std))
