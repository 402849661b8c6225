"""Gaussian noise on gradients that fades with the steps: g + N(0, sigma_t^2) with sigma_t^2 = eta / (1 + t)^gamma.

Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks" (arXiv 1511.06807). It is added after clipping.
`relative` takes sigma_t as a share of the root mean square of all gradients of the step: AdamW divides a gradient by its own size, beside which
sigma_t would be everything at the sizes that language models have.

The noise of an element depends on the seed, the step and the element alone, so neither on the number of ranks nor on the ZeRO stage nor on where a run
was resumed. It is drawn by pieces of a parameter, each by a generator of its own; a rank draws the pieces of which it holds a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from training.zero.local_state import Piece, gradient_pieces

CHUNK = 1 << 20  # elements of a parameter that are drawn together
STEP = 1_000_003  # a prime above the numbers of steps' parameters and their pieces


@dataclass
class Config:
    eta: float = 0.01
    gamma: float = 0.55
    relative: bool = True

    def problems(self, run: Any) -> list[str]:
        problems = [f"{key} must be zero or more, not {value:g}." for key, value in (("eta", self.eta), ("gamma", self.gamma)) if value < 0]
        if run is not None and "nvme" in (run.deepspeed.offload_optimizer, run.deepspeed.offload_parameters):
            problems.append("type is grad_noise, which needs gradients in memory; take optim.wrapper=none or no offload to nvme.")
        return problems


def sigma(config: Config, step: int) -> float:
    """The standard deviation at the step after `step` steps."""
    return math.sqrt(config.eta / (1 + step) ** config.gamma)


def noise(piece: Piece, index: int, seed: int, step: int, device: torch.device) -> torch.Tensor:
    """Standard normal numbers for the elements of `piece`, which is of the parameter number `index`."""
    parts, end = [], piece.first + piece.count
    for chunk in range(piece.first // CHUNK, -(-end // CHUNK)):
        low, high = chunk * CHUNK, min((chunk + 1) * CHUNK, piece.whole)
        generator = torch.Generator(device).manual_seed((((seed * STEP + step) * STEP + index) * STEP + chunk) % (1 << 63))
        drawn = torch.randn(high - low, generator=generator, device=device)
        parts.append(drawn[max(0, piece.first - low) : end - low])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class GradientNoise:
    """Adds to the gradients that are there when it is called."""

    def __init__(self, engine: Any, config: Config) -> None:
        self.engine, self.config = engine, config
        self.index = {name: i for i, name in enumerate(engine.parameters)}
        self.count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.parameters.values())

    @torch.no_grad()
    def __call__(self) -> None:
        engine = self.engine
        size = sigma(self.config, engine.steps_taken)
        if self.config.relative:
            limit = engine.config.train.grad_clip or math.inf
            size *= min(engine.norm_now(), limit) / math.sqrt(self.count)
        if not size:
            return
        scale = engine.optimizer.grad_scale  # what the optimizer is still to divide gradients by
        for tensor, piece in gradient_pieces(engine):
            gradient = tensor.grad.view(-1)[piece.start : piece.start + piece.count]
            drawn = noise(piece, self.index[piece.name], engine.config.seed, engine.steps_taken, gradient.device)
            gradient.add_(drawn * size if scale is None else drawn * (size * scale))


def wrap(engine: Any, config: Config) -> None:
    if config.eta:
        engine.optimizer.before_step = GradientNoise(engine, config)
