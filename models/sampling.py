"""Which token comes next: filters on the logits, a draw, and the text that may be shown while more is to come.

The filters are those of the field, in its usual order: repetition penalty (Keskar et al. 2019, arXiv 1909.05858), temperature, top-k,
top-p (Holtzman et al. 2019, arXiv 1904.09751), min-p (arXiv 2407.01082). Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.errors import UserError

NEVER = float("-inf")
# Of what logits are divided or multiplied by: beyond, they may be infinite or NaN in fp32, which draws the last token.
LEAST, MOST = 1e-6, 1e6


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest. Raises UserError, a line for each value out of its range."""

    temperature: float = 0.8
    top_k: int | None = 50  # keep the k likeliest; None or 0: all
    top_p: float | None = None  # keep the smallest set that holds this much probability; None or 1: all
    min_p: float | None = None  # keep what is at least this fraction as likely as the likeliest; None or 0: all
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens that the text already holds

    def __post_init__(self) -> None:
        problems = []
        if self.temperature != 0 and not LEAST <= self.temperature < math.inf:
            problems.append(f"temperature must be zero (the likeliest token) or a finite number from {LEAST:g} on, not {self.temperature}.")
        if self.top_k is not None and self.top_k < 0:
            problems.append(f"top_k must be zero (all tokens) or more, not {self.top_k}.")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            problems.append(f"top_p must lie between 0 and 1, not {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            problems.append(f"min_p must lie between 0 and 1, not {self.min_p}.")
        if not LEAST <= self.repetition_penalty <= MOST:
            problems.append(f"repetition_penalty must be from {LEAST:g} to {MOST:,.0f} (1: none), not {self.repetition_penalty}.")
        if problems:
            raise UserError(problems)

    def filtered(self, logits_BV: Tensor, seen_BV: Tensor | None = None) -> Tensor:
        """The logits to draw from, fp32, -inf where a token is ruled out. seen: bool, the tokens the text already holds."""
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        if seen_BV is not None and self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            lowered = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
            logits_BV = torch.where(seen_BV, lowered, logits_BV)
        if self.temperature == 0:
            return logits_BV
        logits_BV = logits_BV / self.temperature
        if self.top_k:
            kth = logits_BV.topk(min(self.top_k, logits_BV.shape[-1]), -1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < kth, NEVER)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits_BV.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            before[:, 0] = -1.0  # the likeliest token always stays
            logits_BV = ordered.masked_fill(before >= self.top_p, NEVER).gather(-1, order.argsort(-1))
        if self.min_p:
            likely = logits_BV.softmax(-1)
            logits_BV = logits_BV.masked_fill(likely < self.min_p * likely.amax(-1, keepdim=True), NEVER)
        return logits_BV

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None = None, seen_BV: Tensor | None = None) -> Tensor:
        """One token id per row (B,). The generator lives on the CPU and gives one number a row, so that a seed means the same everywhere."""
        logits_BV = self.filtered(logits_BV, seen_BV)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        share_BV = logits_BV.double().softmax(-1).cumsum(-1)
        point_B = torch.rand(logits_BV.shape[0], generator=generator, dtype=torch.float64).to(logits_BV.device)
        # The first token whose cumulative share is above the point: never one of share zero.
        token_B = torch.searchsorted(share_BV, point_B[:, None] * share_BV[:, -1:], right=True)[:, 0]
        # of shares that are NaN it would be beyond the vocabulary; whoever draws says what is wrong (models/session.py)
        return token_B.clamp_max(share_BV.shape[-1] - 1)


def sample(logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """One token id per row (B,)."""
    return Sampling(temperature, top_k, top_p).draw(logits_BV, generator)


class TextStream:
    """Ids in, text out, as soon as it is certain: nothing of a character that is not whole, nothing that may become a stop string.

    `text` is all that was given out, `stopped` whether a stop string ended it; the stop string itself is not shown.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        """before: ids of the text that goes before, so that a word's pieces join as in one decoding."""
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        first = max(0, len(before) - 8)
        while first and tokenizer.decode(list(before[first:])).startswith("\ufffd"):
            first -= 1  # inside of a character: of a run of bytes (Llama 2) all that follow would be lost with it
        self.ids = list(before[first:])
        self.start, self.end = 0, len(self.ids)  # ids[start:end] are decoded again as the context of what follows
        self.text, self.undecided, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """The text that is certain now, often empty."""
        if self.stopped:
            return ""
        self.ids.append(token)
        return self._give(self._fresh(False))

    def finish(self) -> str:
        """What was held back, when no more ids follow."""
        if self.stopped:
            return ""
        last = self._give(self._fresh(True))
        rest, self.undecided = ("", self.undecided) if self.stopped else (self.undecided, "")
        self.text += rest
        return last + rest

    def _fresh(self, whole: bool) -> str:
        context = self.tokenizer.decode(self.ids[self.start : self.end], skip_special_tokens=True)
        text = self.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)
        if len(text) <= len(context) or (text.endswith("\ufffd") and not whole):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text[len(context) :]

    def _give(self, fresh: str) -> str:
        self.undecided += fresh
        stop_places = [at for s in self.stop if (at := self.undecided.find(s)) >= 0]
        if stop_places:
            certain, self.undecided, self.stopped = self.undecided[: min(stop_places)], "", True
        else:
            keep = max((n for s in self.stop for n in range(1, len(s)) if self.undecided.endswith(s[:n])), default=0)
            certain, self.undecided = self.undecided[: len(self.undecided) - keep], self.undecided[len(self.undecided) - keep :]
        self.text += certain
        return certain
