"""Unigram and bigram models counted from the same training tokens: what a language model must beat to have learnt anything.

The bigram interpolates by absolute discounting (Ney, Essen and Kneser 1994): p(w|v) = max(c(v,w) - d, 0) / c(v) + d n(v) / c(v) p(w),
with n(v) the number of distinct followers of v, and the unigram p(w) = (c(w) + 1) / (N + V).
"""

from __future__ import annotations

import numpy as np
import torch

from data.shards import ShardSet
from evals.measures.perplexity import Perplexity, held_out_rows, text_bytes
from models.prompt import told_by_prompt

DISCOUNT = 0.75
MOST = 50_000_000  # training tokens that are counted
NAMES = ("unigram", "bigram")


class CountBaselines:
    """Both models, counted over the first `max_tokens` tokens of the training split."""

    def __init__(self, train: ShardSet, max_tokens: int = MOST) -> None:
        tokens = np.asarray(train.read(0, min(train.n_tokens, max_tokens))).astype(np.int64)
        self.vocabulary = train.vocab_size
        self.unigram = (np.bincount(tokens, minlength=self.vocabulary) + 1.0) / (len(tokens) + self.vocabulary)
        self.keys, self.counts = np.unique(tokens[:-1] * self.vocabulary + tokens[1:], return_counts=True)
        self.context = np.bincount(tokens[:-1], minlength=self.vocabulary).astype(np.float64)
        self.followers = np.bincount(self.keys // self.vocabulary, minlength=self.vocabulary).astype(np.float64)

    def nll(self, tokens: np.ndarray, scored: np.ndarray | None = None) -> tuple[float, float]:
        """(unigram, bigram): nats of tokens[1:] given tokens[:-1], summed over those that are `scored` (n,), None: all. tokens: ids (n+1,)."""
        previous, word = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        p_unigram = self.unigram[word]
        key = previous * self.vocabulary + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        count = np.where(self.keys[at] == key, self.counts[at], 0)
        occurrences = np.maximum(self.context[previous], 1)
        p_bigram = np.maximum(count - DISCOUNT, 0) / occurrences + DISCOUNT * self.followers[previous] / occurrences * p_unigram
        p_bigram = np.where(self.context[previous] > 0, p_bigram, p_unigram)
        every = np.ones(len(word), bool) if scored is None else scored
        return float(-np.log(p_unigram[every]).sum()), float(-np.log(p_bigram[every]).sum())


def baselines(train: ShardSet, held_out: ShardSet, length: int, max_tokens: int | None, prompt: int = 0) -> dict[str, Perplexity]:
    """The scores of unigram and bigram counts of `train` on the held-out tokens that `perplexity.evaluate` scores with the same settings.

    length: tokens of a row; max_tokens: scored in all, None for the whole split; prompt: `models.prompt.prompt_of` the model beside them, whose
    prompts are not scored.
    """
    counts, totals = CountBaselines(train), [Perplexity() for _ in NAMES]
    for tokens, segments in held_out_rows(held_out, length, max_tokens):
        scored = ~told_by_prompt(torch.from_numpy(segments)[None, :-1], prompt)[0].numpy()
        size = text_bytes(held_out, tokens, scored)
        for total, nats in zip(totals, counts.nll(tokens, scored)):
            total.nll_nats += nats
            total.tokens += int(scored.sum())
            total.bytes += size
    return dict(zip(NAMES, totals))
