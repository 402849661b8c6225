"""Unigram and bigram models counted from the same training tokens: what a language model must beat to have learnt anything.

The bigram interpolates by absolute discounting (Ney, Essen and Kneser 1994): p(w|v) = max(c(v,w) - d, 0) / c(v) + d n(v) / c(v) p(w),
with n(v) the number of distinct followers of v, and the unigram p(w) = (c(w) + 1) / (N + V).
"""

from __future__ import annotations

import numpy as np

from data.shards import ShardSet

DISCOUNT = 0.75


class CountBaselines:
    """Counts over at most `max_tokens` training tokens."""

    def __init__(self, train: ShardSet, max_tokens: int = 50_000_000) -> None:
        tokens = np.asarray(train.read(0, min(train.n_tokens, max_tokens))).astype(np.int64)
        self.vocabulary = train.vocab_size
        self.unigram = (np.bincount(tokens, minlength=self.vocabulary) + 1.0) / (len(tokens) + self.vocabulary)
        self.keys, self.counts = np.unique(tokens[:-1] * self.vocabulary + tokens[1:], return_counts=True)
        self.context = np.bincount(tokens[:-1], minlength=self.vocabulary).astype(np.float64)
        self.followers = np.bincount(self.keys // self.vocabulary, minlength=self.vocabulary).astype(np.float64)

    def nll(self, tokens: np.ndarray) -> tuple[float, float]:
        """(unigram, bigram) summed nats of tokens[1:] given tokens[:-1]."""
        previous, word = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        p_unigram = self.unigram[word]
        key = previous * self.vocabulary + word
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        count = np.where(self.keys[at] == key, self.counts[at], 0)
        seen = np.maximum(self.context[previous], 1)
        p_bigram = np.maximum(count - DISCOUNT, 0) / seen + DISCOUNT * self.followers[previous] / seen * p_unigram
        p_bigram = np.where(self.context[previous] > 0, p_bigram, p_unigram)
        return float(-np.log(p_unigram).sum()), float(-np.log(p_bigram).sum())
