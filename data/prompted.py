"""Rows whose documents begin with a prompt that the model sees whole: in it masked tokens are asked for, behind it the next ones (arXiv 2407.05483).

Predicting the next token of a prompt would be no prediction, so there a share of the tokens is replaced by the mark that ends texts, which never stands
within one, and each is the label of its own place. The loss is the mean over all labels; with a prompt of half a sequence and a share of
0.15, masked tokens count 0.15 to 1 beside the others. Dimensions: R rows, T length.
"""

from __future__ import annotations

import numpy as np

from data.loader import Labelled, Reader, Rows

IGNORE = -100


class PromptReader(Reader):
    """The rows of `reader`, with prompts of `prompt` tokens. Which tokens are masked is a function of (seed, sample)."""

    def __init__(self, reader: Reader, prompt: int, share: float, mask_id: int, seed: int) -> None:
        self.reader, self.prompt, self.share, self.mask_id, self.seed = reader, prompt, share, mask_id, seed
        self.seq_len = reader.seq_len

    def samples(self, k_R: np.ndarray) -> Rows:
        return self.reader.samples(k_R)

    def labelled(self, k_R: np.ndarray) -> Labelled:
        inputs, labels, segments = self.reader.labelled(k_R)
        at = np.arange(inputs.shape[1])
        begins = np.concatenate([np.ones_like(segments[:, :1], dtype=bool), segments[:, 1:] != segments[:, :-1]], 1)
        place = at - np.maximum.accumulate(np.where(begins, at, 0), 1)
        draws = np.stack([np.random.default_rng([self.seed, int(k)]).random(inputs.shape[1]) for k in k_R])
        masked = (place < self.prompt) & (draws < self.share) & (inputs != self.mask_id)
        labels = np.where(masked, inputs, np.where(place < self.prompt - 1, IGNORE, labels))
        return np.where(masked, self.mask_id, inputs), labels, segments
