"""Universal Transformer (arXiv 1807.03819): all layers together are one step that is taken several times with the same weights. With halting (Graves
2016, arXiv 1603.08983) each token says after every step how sure it is, and what is read of it is a mean of its steps, weighted by that.

A token that has halted keeps its stream and is still there to be seen by others, at every later step. All steps are computed for all tokens, so that
ranks and graphs do the same work whatever the tokens say. Legend: B batch, T time, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.init import normal_, tag
from models.walk import Depth, Walk


@dataclass
class Config:
    loops: int = 4  # steps
    step_embedding: bool = True  # a learned vector is added before every step but the first
    halting: bool = False  # tokens halt one by one
    ponder: float = 0.01  # weight, in nats, of a token's steps and remainder in the loss
    epsilon: float = 0.01  # a token halts when its weights have come to 1 - epsilon

    def problems(self, n_layers: int) -> list[str]:
        problems = [] if 1 <= self.loops <= 1000 else [f"loops must be from 1 to 1000, not {self.loops}."]
        if self.ponder < 0 or not 0 < self.epsilon < 1:
            problems.append(f"ponder must be zero or more, and epsilon between 0 and 1, not {self.ponder} and {self.epsilon}.")
        return problems

    @property
    def varies(self) -> bool:
        return False

    def learnt(self, n_layers: int) -> list[int]:
        return list(range(n_layers)) * self.loops


class Way(Depth):
    """steps_BT: after a call with halting, how many steps each token has taken. loops: may be set to another number of steps."""

    def __init__(self, config: Config, d_model: int, n_layers: int) -> None:
        super().__init__()
        self.config, self.n_layers, self.loops = config, n_layers, config.loops
        rows = config.loops - 1 if config.step_embedding else 0
        self.steps = tag(nn.Parameter(torch.empty(rows, d_model)), "no_decay") if rows else None
        self.halt = tag(nn.Parameter(torch.empty(d_model)), "no_decay") if config.halting else None
        self.halt_bias = tag(nn.Parameter(torch.empty(1)), "no_decay") if config.halting else None
        self.steps_BT: Tensor | None = None

    def init_weights(self, std: float, n_layers: int) -> None:
        if self.steps is not None:
            normal_(self.steps, std)
        if self.halt is not None and self.halt_bias is not None:
            normal_(self.halt, std)
            nn.init.ones_(self.halt_bias)

    def visits(self) -> list[int]:
        return list(range(self.n_layers)) * self.loops

    def forward(self, blocks: nn.ModuleList, walk: Walk) -> None:
        if self.halt is not None:
            return self._halting(blocks, walk)
        for step in range(self.loops):
            if step and self.steps is not None:
                walk.x = self._told(walk.x, step)
            for block in blocks:
                walk.through(block)

    def _told(self, x_BTD: Tensor, step: int) -> Tensor:
        """x with the vector of this step; beyond the last that was trained, with its."""
        if not step or self.steps is None:
            return x_BTD
        return x_BTD + self.steps[min(step, len(self.steps)) - 1].to(x_BTD.dtype)

    def _halting(self, blocks: nn.ModuleList, walk: Walk) -> None:
        assert self.halt is not None and self.halt_bias is not None
        x_BTD = walk.x
        running = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
        given = left = taken = torch.zeros(x_BTD.shape[:2], dtype=torch.float32, device=x_BTD.device)
        read_BTD = torch.zeros_like(x_BTD, dtype=torch.promote_types(x_BTD.dtype, torch.float32))
        for step in range(self.loops):
            walk.x = self._told(x_BTD, step)
            for block in blocks:
                walk.through(block)
            y_BTD = walk.x
            sure = torch.sigmoid((y_BTD.float() * self.halt.float()).sum(-1) + self.halt_bias.float())
            halts = running & ((given + sure > 1 - self.config.epsilon) | (step == self.loops - 1))
            weight = torch.where(halts, 1 - given, torch.where(running, sure, 0.0))
            left, taken = torch.where(halts, weight, left), taken + running.float()
            read_BTD = read_BTD + weight[..., None] * y_BTD
            given, x_BTD = given + weight, torch.where(running[..., None], y_BTD, x_BTD)
            running = running & ~halts
        walk.x = read_BTD.to(x_BTD.dtype)
        walk.token_loss_BT = self.config.ponder * (taken + left)
        self.steps_BT = taken.detach()
