"""Decoding at speed: weights in the precision of inference, and one step of the model as a CUDA graph.

    decoder = Decoder(model, state, capacity=2048)   # state: after the prompt, from model(..., state=...)
    logits_BV = decoder.step(token_B)                # as often as there is room

The step reads and writes tensors that stay where they are. On a CUDA device it is captured once and replayed; elsewhere the same step
runs as it is. For few rows the step is made of fused kernels (kernels/decode_step) where every layer has them. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import decode_step
from kernels.recording import undisturbed
from models.init import roles
from models.lm import LanguageModel, LMState


def cast(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The model's weights in `dtype`, in place; what must stay fp32 (the recurrences' own parameters) does."""
    for parameter in model.parameters():
        if "keep_fp32" not in roles(parameter):
            parameter.data = parameter.data.to(dtype)
    return model


def fixed(model: LanguageModel, state: LMState, capacity: int) -> LMState:
    """A copy of `state` whose tensors a step writes into: caches get room for `capacity` tokens."""
    return LMState([block.mixer.fixed_state(part, capacity) for block, part in zip(model.visits(), state.layers)])


def _tensors(state: LMState) -> list[Tensor]:
    tensors = []
    for part in state.layers:  # plain loops: torch.compile reads this too
        for value in part.__dict__.values():
            if isinstance(value, Tensor):
                tensors.append(value)
    return tensors


class Decoder:
    """Raises ValueError for a capacity that the state does not fit in, and when it is used up. The model's weights must not change meanwhile."""

    def __init__(self, model: LanguageModel, state: LMState, capacity: int, *, compiled: bool = False, fused: bool | None = None) -> None:
        """capacity: the most tokens a cache holds, those read included. compiled: torch.compile fuses the step's small operations.
        fused: the kernels of kernels/decode_step; None: where they can run, for as few rows as they are made for."""
        layers = [(block.mixer, part) for block, part in zip(model.visits(), state.layers)]
        cached = [mixer.cached_tokens(part) for mixer, part in layers if mixer.grows()]
        self.room = capacity - max(cached) if cached else -1  # -1: the state has no caches, so that there is no limit
        if cached and self.room < 1:
            raise ValueError(f"The cache holds {max(cached)} tokens already; a capacity of {capacity} leaves no room.")
        self.model, self.state = model, fixed(model, state, capacity)
        device = model.embedding.weight.device
        rows = _tensors(state)[0].shape[0]
        self.token_B1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.logits_BV = torch.zeros(rows, model.config.vocab_size, dtype=model.head.weight.dtype, device=device)
        if fused is None:
            fused = (
                not compiled
                and device.type == "cuda"
                and not decode_step.why_not(device, rows)
                and model.head.weight.dtype != torch.float64
            )
        plan = self._plan() if fused else None
        self.fused = plan is not None
        once = self._once if plan is None else plan
        self._step: Any = torch.compile(once, dynamic=False) if compiled else once
        self.graph = self._capture() if device.type == "cuda" else None

    def _plan(self) -> Callable[[], None] | None:
        """The step in fused kernels; None if a layer has no such form. The residual stream is fp32 there."""
        model = self.model
        if model.depth is not None:  # what it does between visits has no such form
            return None
        x_BD = torch.zeros(len(self.token_B1), model.config.d_model, device=self.token_B1.device)
        visits = list(zip(model.visits(), self.state.layers))
        steps = [step for block, part in visits if (step := block.fused_step(x_BD, part)) is not None]
        if len(steps) < len(visits):
            return None

        gain = model.norm.gain.detach()

        def once() -> None:
            x_BD.copy_(model.embedding(self.token_B1[:, 0]))
            for step in steps:
                step()
            decode_step.project(x_BD, model.head.weight, self.logits_BV, norm_K=gain, eps=model.norm.eps)

        return torch.no_grad()(once)

    def _once(self) -> None:
        output = self.model(self.token_B1, state=self.state, last_only=True)
        self.logits_BV.copy_(output.logits[:, -1])
        for old, new in zip(_tensors(self.state), _tensors(output.state)):
            if old is not new:
                old.copy_(new)

    @torch.no_grad()
    def _capture(self) -> Any:
        changed = [  # caches need no copy: a step writes only behind the tokens that were read
            tensor
            for block, part in zip(self.model.visits(), self.state.layers)
            for tensor in block.mixer.tensors_of(part, "recurrent", "history", "bookkeeping").values()
        ]
        before = [t.clone() for t in changed]
        here = self.token_B1.device  # the model may lie on another device than the current one
        stream = torch.cuda.Stream(here)
        stream.wait_stream(torch.cuda.current_stream(here))
        with torch.cuda.device(here), torch.cuda.stream(stream):  # warm up: kernels are built and workspaces allocated outside the graph
            for _ in range(3):
                for old, new in zip(changed, before):
                    old.copy_(new)
                self._step()
        torch.cuda.current_stream(here).wait_stream(stream)
        with torch.cuda.device(here):
            graph = torch.cuda.CUDAGraph()
            # a stream of this device, as torch's own for captures is one of the device that captured first; other threads may do what they like
            with undisturbed(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._step()
        for old, new in zip(changed, before):
            old.copy_(new)
        return graph

    @torch.no_grad()
    def step(self, token_B: Tensor) -> Tensor:
        """The logits (B, V) after one more token a row; the tensor is written over by the next step."""
        if self.room == 0:
            raise ValueError("The cache is full; make a Decoder with a larger capacity.")
        self.room -= self.room > 0
        self.token_B1.copy_(token_B[:, None])
        if self.graph is not None:
            with torch.cuda.device(self.token_B1.device):  # on its current stream
                self.graph.replay()
        else:
            self._step()
        return self.logits_BV

    def release(self) -> LMState:
        """The state after all steps, as the model takes it. The decoder is used up: the state shares its tensors."""
        self.room = 0
        return LMState([block.mixer.open_state(part) for block, part in zip(self.model.visits(), self.state.layers)])
