"""Our own checkpoints behind the interface of evals/adapters/base.py. Legend as there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from data.tokenizer import TextCoder
from evals.adapters.base import Adapter, LayerState, as_heads
from models.lm import LMState


class OwnAdapter(Adapter):
    """A models.lm.LanguageModel: each block takes and returns its layer's state."""

    kind = "everywhen"

    def __init__(self, model: Any, coder: TextCoder | None, name: str, folder: str, precision: str = "fp32") -> None:
        self.model, self.coder, self.name, self.folder, self.precision = model.eval(), coder, name, folder, precision
        self.vocab_size, self.device = model.config.vocab_size, model.embedding.weight.device
        self.whole_beyond = model.whole_beyond

    def _start(self, batch: int) -> Any:
        model: Any = self.model
        return model.init_state(batch)

    def _hidden(self, ids_BT: Tensor, state: Any) -> tuple[Tensor, Any]:
        model: Any = self.model
        return model.hidden(ids_BT, state)  # type: ignore[no-any-return]

    def _head(self, hidden: Tensor) -> Tensor:
        model: Any = self.model
        return model.head(hidden)

    def layer_states(self, state: Any) -> list[LayerState]:
        model: Any = self.model
        return [
            as_heads(layer, name, tensor)
            for layer, (block, part) in enumerate(zip(model.visits(), state.layers))
            for name, tensor in block.mixer.named_memories(part).items()
        ]

    def replace_states(self, state: Any, change: Callable[[int, str, Tensor], Tensor]) -> Any:
        model: Any = self.model
        layers = []
        for layer, (block, part) in enumerate(zip(model.visits(), state.layers)):
            recurrent = block.mixer.tensors_of(part, "recurrent")
            changed = {name: change(layer, name, tensor) for name, tensor in recurrent.items()}
            layers.append(dataclasses.replace(part, **changed) if changed else part)
        return LMState(layers)
