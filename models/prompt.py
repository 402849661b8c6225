"""Prompts that are read twice: the first tokens of a document, which some mixers (models/mixers/jrt.py) let every token of the document see.

A prompt is as many of a document's first tokens as the mixer's `prompt` says, as far as they are in the call in which the document begins: a prompt is
to be read in one call. What a model makes of a token there has seen the tokens behind it, so predictions of prompt tokens count for nothing: training
asks for masked tokens there instead (data/prompted.py), and evaluations score what comes after. Legend: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def places(starts_BT: Tensor | None, shape: tuple[int, ...], device: torch.device, before_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(which document of the call each token is of, 0 the one that goes on from before; its place in it, -1 in one that began in an earlier call).

    before_B: the segments that the carried states ended in, -1 where nothing was read; None: there are none.
    """
    (B, T), at = shape, torch.arange(shape[1], device=device)
    starts = torch.zeros(B, T, dtype=torch.bool, device=device) if starts_BT is None else starts_BT
    document = starts.int().cumsum(1)
    first = torch.where(starts, at, -1).cummax(1).values if T else document
    fresh = first < 0 if before_B is None else (first < 0) & (before_B < 0)[:, None]
    return document, torch.where(first >= 0, at - first, torch.where(fresh, at, -1))


def in_prompt(place_BT: Tensor, prompt: int) -> Tensor:
    """(B, T) bool: which tokens, by their places in documents that begin in this call, are of a prompt."""
    return (place_BT >= 0) & (place_BT < prompt)


def told_by_prompt(segments_BT: Tensor, prompt: int) -> Tensor:
    """(B, T) bool: the tokens of rows that begin here whose next token lies in the same prompt, so that predicting it is no prediction."""
    starts = torch.cat([torch.zeros_like(segments_BT[:, :1], dtype=torch.bool), segments_BT[:, 1:] != segments_BT[:, :-1]], 1)
    _, place = places(starts, tuple(segments_BT.shape), segments_BT.device)
    return in_prompt(place, prompt - 1)


def readers(model: nn.Module) -> list[Any]:
    """The mixers of `model` that read a prompt twice."""
    return [module for module in model.modules() if isinstance(prompt := getattr(module, "prompt", 0), int) and prompt]


def prompt_of(model: nn.Module) -> int:
    """Tokens of the longest prompt that a mixer of `model` reads twice; 0: there is none."""
    return max((module.prompt for module in readers(model)), default=0)


def read_at_once(model: Any, T: int) -> int:
    """How many tokens of a sequence of T have to be its first call: its prompt, or all of them where the model has to see them so."""
    return T if model.whole_beyond is not None and T > model.whole_beyond else prompt_of(model)


@contextmanager
def whole_prompt(model: nn.Module, tokens: int) -> Iterator[None]:
    """Inside, prompts of a model that reads some twice have so many tokens."""
    before = [(module, module.prompt) for module in readers(model)]
    try:
        for module, _ in before:
            module.prompt = tokens
        yield
    finally:
        for module, prompt in before:
            module.prompt = prompt
