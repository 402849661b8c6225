"""Recurrent depth (Huginn, arXiv 2502.05171): a prelude of layers, a core that is run again and again on its own output and the prelude's, and a coda.

    e = norm(prelude(x)),   s_0 = 0,   s_{i+1} = norm(core(W [s_i; e])),   coda(s_r)

Training draws r anew in each step and differentiates through the last few loops only, so that memory does not grow with r; afterwards r is a
setting. The core may hold any mixer: each of its loops has a state of its own. The published s_0 is noise; here it is zero, so that
a text decodes as it was read. Legend: B batch, T time, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from kernels.linear import linear
from models.init import normal_, tag
from models.layers import RMSNorm
from models.walk import Depth, Walk


@dataclass
class Config:
    prelude: int = 1  # layers before the core
    coda: int = 1  # layers behind it
    loops: int = 8  # of the core; in training on average
    spread: float = 0.5  # sigma of the log-normal rate of the Poisson number of loops in training; 0: always `loops`
    backprop: int = 4  # last loops that have a gradient in training

    def problems(self, n_layers: int) -> list[str]:
        problems = []
        if min(self.prelude, self.coda) < 0 or self.prelude + self.coda >= n_layers:
            problems.append(f"prelude {self.prelude} and coda {self.coda} leave no layer of {n_layers} for the core.")
        if not 1 <= self.loops <= 1000 or self.backprop < 1:
            problems.append(f"loops must be from 1 to 1000 and backprop above zero, not {self.loops} and {self.backprop}.")
        if not 0 <= self.spread <= 2:
            problems.append(f"spread must be from 0 to 2, not {self.spread}.")
        return problems

    def order(self, n_layers: int, loops: int) -> list[int]:
        """The layer of each visit."""
        last = n_layers - self.coda
        return [*range(self.prelude), *list(range(self.prelude, last)) * loops, *range(last, n_layers)]

    @property
    def varies(self) -> bool:
        return self.spread > 0 and self.loops > 1

    def learnt(self, n_layers: int) -> list[int]:
        return self.order(n_layers, min(self.loops, self.backprop))


class Way(Depth):
    """loops: may be set to another number of loops. drawn: that of a training step, settled by `begin_step`."""

    def __init__(self, config: Config, d_model: int, n_layers: int) -> None:
        super().__init__()
        self.config, self.d_model, self.n_layers = config, d_model, n_layers
        self.loops, self.drawn = config.loops, config.loops
        self.inject_norm, self.norm = RMSNorm(d_model), RMSNorm(d_model)
        self.adapter = nn.Linear(2 * d_model, d_model, bias=False)
        tag(self.adapter.weight, fan_in=2 * d_model)

    def init_weights(self, std: float, n_layers: int) -> None:
        normal_(self.adapter.weight, math.sqrt(2 / (5 * self.d_model)))  # the published rule
        self.inject_norm.init_weights()
        self.norm.init_weights()

    def visits(self) -> list[int]:
        return self.config.order(self.n_layers, self.loops)

    def begin_step(self, seed: int, step: int) -> None:
        """r = 1 + Poisson(rate), the rate log-normal, E[r] = loops; at most four times that."""
        if not self.config.varies:
            return
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
        noise = self.config.spread * torch.randn(1, generator=generator) - self.config.spread**2 / 2
        rate = (self.config.loops - 1) * noise.exp()
        self.drawn = min(1 + int(torch.poisson(rate, generator=generator)), 4 * self.config.loops)

    def forward(self, blocks: nn.ModuleList, walk: Walk) -> None:
        c, last = self.config, self.n_layers - self.config.coda
        for i in range(c.prelude):
            walk.through(blocks[i])
        stream = walk.x.dtype  # fp32, where norms and products are bf16
        e_BTD = self.inject_norm(walk.x)
        s_BTD = torch.zeros_like(e_BTD)
        loops = self.drawn if self.training else self.loops
        learning = torch.is_grad_enabled()
        for loop in range(loops):
            with torch.set_grad_enabled(learning and (not self.training or loop >= loops - c.backprop)):
                walk.x = linear(torch.cat([s_BTD, e_BTD], -1), self.adapter).to(stream)
                for i in range(c.prelude, last):
                    walk.through(blocks[i])
                s_BTD = self.norm(walk.x)
        walk.x = s_BTD.to(stream)
        for i in range(last, self.n_layers):
            walk.through(blocks[i])

    def flops_per_token(self) -> int:
        return 4 * self.loops * self.d_model**2
