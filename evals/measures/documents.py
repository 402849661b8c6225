"""Perplexity and bits per byte on documents, each read with an empty state: the figure that models with different tokenizers share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evals.adapters.base import Adapter, ItemError, perplexity
from evals.measures.statistics import bootstrap_ratio

BLOCK = 1024  # tokens of a unit of the bootstrap where there are few documents
FEW = 8


def document_perplexity(
    adapter: Adapter,
    documents: list[tuple[np.ndarray, int]],
    *,
    chunk: int = 2048,
    batch: int = 8,
    seed: int = 0,
    unit: str = "documents",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of documents, each read with an empty state: {'perplexity', 'bits_per_byte', their 95 % intervals, ...}.

    documents: (ids (n+1,), bytes of all but the first); the first id is read and not scored. Intervals are a bootstrap over documents, over blocks of 1,024 tokens where there are fewer than 8
    (bytes then shared out evenly over a document's tokens). unit: what several pairs are called. Raises ItemError where no document has two tokens.
    """
    documents = [(ids, size) for ids, size in documents if len(ids) > 1]
    if not documents:
        raise ItemError("There is no document of two tokens or more to score.")
    given = len(documents)
    documents = [
        (ids, size) for ids, size in documents if len(ids) > adapter.prompt
    ] or documents  # if none has more, the first is refused below
    left_out = f"; {given - len(documents)} within the prompt of {adapter.prompt} left out" if len(documents) < given else ""
    units = _scored(adapter, documents, chunk, batch, on_progress)
    nats, tokens, sizes = (np.array(column, dtype=np.float64) for column in zip(*units))
    low, high = bootstrap_ratio(nats, tokens, seed=seed)
    low_bits, high_bits = (x / math.log(2) for x in bootstrap_ratio(nats, sizes, seed=seed))
    known = low == low  # not with one unit
    called = unit if len(documents) > 1 else re.sub(r"s\b", "", unit, count=1)
    per_token, bits = float(nats.sum() / tokens.sum()), float(nats.sum() / sizes.sum() / math.log(2))
    return {
        "documents": len(documents),
        "tokens": int(tokens.sum()),
        "bytes": round(float(sizes.sum())),
        "nats_per_token": per_token,
        "perplexity": perplexity(per_token),
        "perplexity_low": perplexity(low) if known else None,
        "perplexity_high": perplexity(high) if known else None,
        "bits_per_byte": bits,
        "bits_per_byte_low": low_bits,
        "bits_per_byte_high": high_bits,
        "interval": f"bootstrap over {unit}" if len(documents) >= FEW else "bootstrap over blocks of 1,024 tokens",
        "summary": f"{bits:.4f} bits per byte{f' ({low_bits:.4f}-{high_bits:.4f})' if known else ''}, perplexity {perplexity(per_token):.2f} over {len(documents)} {called}{left_out}",
    }


def _scored(
    adapter: Adapter, documents: list[tuple[np.ndarray, int]], chunk: int, batch: int, on_progress: Callable[[int, int], None] | None
) -> list[tuple[float, int, float]]:
    """(nats, tokens, bytes) of each document, of few documents of each of their blocks; the longest first, those of one length side by side."""
    units: list[tuple[float, int, float]] = []
    order = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
    done = 0
    while order:
        length = len(documents[order[0]][0])
        group = [i for i in order[:batch] if len(documents[i][0]) == length]
        order = order[len(group) :]
        scored: list[np.ndarray] = []

        def each(first: int, nll: torch.Tensor, state: Any, scored: list[np.ndarray] = scored) -> None:
            scored.append(nll.double().cpu().numpy())

        adapter.stream(torch.from_numpy(np.stack([documents[i][0] for i in group])), chunk, each)
        nll_BT, n = np.concatenate(scored, 1), length - 1
        block = n if len(documents) >= FEW else BLOCK
        scored_tokens = nll_BT.shape[1]  # fewer than n where a prompt is not scored
        for i, row in zip(group, nll_BT):
            parts = [row[a : a + block] for a in range(0, scored_tokens, block)]
            units += [(float(part.sum()), len(part), documents[i][1] * len(part) / n) for part in parts]
        done += len(group)
        if on_progress:
            on_progress(done, len(documents))
    return units
