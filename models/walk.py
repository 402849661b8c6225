"""The way of tokens through a model's blocks, and the contract of what may lead them elsewhere than once through each (models/depth).

Legend: B batch, T time, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from data.errors import UserError
from kernels.residual import residual
from models.init import Module
from models.segments import Documents


class Walk:
    """Tokens on their way: each visit of a block takes its state from `states` (None: there are none) and leaves the next one in `after`.

    token_loss_BT: nats that the way itself adds to each token's loss, weighted, or None.
    """

    def __init__(self, x_BTD: Tensor, states: list[Any] | None, segment_ids: Tensor | None, documents: Documents | None) -> None:
        self.stream = x_BTD
        self.owed: tuple[Tensor, Tensor | None] | None = None
        self.states = states
        self.after: list[Any] = []
        self.segment_ids, self.documents = segment_ids, documents
        self.token_loss_BT: Tensor | None = None

    def through(self, block: Any) -> None:
        """One visit of a models.block.Block."""
        before = None if self.states is None else self.states[len(self.after)]
        self.stream, self.owed, after = block.within(self.stream, before, self.segment_ids, self.documents, self.owed)
        self.after.append(after)

    @property
    def x(self) -> Tensor:
        """The stream (B, T, D), with what the last block has still to add to it."""
        if self.owed is not None:
            y, scale = self.owed
            self.stream, self.owed = self.stream + y if scale is None else residual(self.stream, y, scale), None
        return self.stream

    @x.setter
    def x(self, x_BTD: Tensor) -> None:
        self.stream, self.owed = x_BTD, None


class Depth(Module):
    """In which order and how often blocks are visited. A file of models/depth has a class Way(Depth) that is made of (config, d_model, n_layers) and
    a dataclass Config with `problems(n_layers)`, sentences; `learnt(n_layers)`, the block of each visit of a training step that has a gradient; and
    `varies`, whether training draws the number of visits by `begin_step`.
    """

    config: Any
    _loops: int

    @property
    def loops(self) -> int:
        """How often the looped part is visited where nothing is trained; may be set."""
        return self._loops

    @loops.setter
    def loops(self, loops: int) -> None:
        if not 1 <= loops <= 1000:
            raise UserError(f"loops must be from 1 to 1000, not {loops}.")
        self._loops = loops

    def forward(self, blocks: nn.ModuleList, walk: Walk) -> None:
        """Leads `walk` through the blocks; without training the visits are those of `visits`, in this order."""
        raise NotImplementedError

    def visits(self) -> list[int]:
        """The block of each visit where nothing is trained; every one of them has a state."""
        raise NotImplementedError

    def begin_step(self, seed: int, step: int) -> None:
        """Settles what training draws for the step after `step` steps, the same on every rank."""

    def init_weights(self, std: float, n_layers: int) -> None:
        """Draws all parameters from torch's global generator."""
        raise NotImplementedError

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token beside those of the blocks."""
        return 0
