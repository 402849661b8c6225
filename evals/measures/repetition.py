"""Repetition in greedy text: the measures of hyperfitting (Carlsson et al. 2024, "The Hyperfitting Phenomenon", arXiv 2412.04318), for any model.

After each of some contexts of held-out text the model writes on greedily, and of what it writes are taken: the type-token ratio (different tokens /
tokens), distinct n-grams, 4-grams that the same text had before, the entropy of its predictions, and the longest passage that stands in the training
data. Beside them the same of the text itself, and the loss on it: repetition that falls while perplexity collapses is seen in one place.

Legend: R rows, L tokens of a row, context and then text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evals.adapters.base import Adapter, perplexity

CONTEXT, WRITTEN = 32, 96  # tokens, as in the paper


def type_token_ratio(ids_L: np.ndarray) -> float:
    """Different tokens / tokens."""
    return len(set(ids_L.tolist())) / len(ids_L)


def _grams(ids_L: np.ndarray, n: int) -> list[tuple[int, ...]]:
    ids = ids_L.tolist()
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(ids_L: np.ndarray, n: int) -> float:
    """Different n-grams / n-grams."""
    grams = _grams(ids_L, n)
    return len(set(grams)) / len(grams)


def repeated(ids_L: np.ndarray, n: int) -> float:
    """Share of the n-grams that stood in the same text before."""
    return 1 - distinct(ids_L, n)


def longest_passage(ids_L: np.ndarray, training: np.ndarray) -> int:
    """Tokens of the longest stretch of `ids_L` that stands in `training`."""
    width, data = training.dtype.itemsize, np.ascontiguousarray(training).tobytes()
    ids, longest, first = ids_L.astype(training.dtype), 0, 0
    while first + longest < len(ids):
        if _stands(ids[first : first + longest + 1].tobytes(), data, width):
            longest += 1
        else:
            first += 1
    return longest


def _stands(passage: bytes, data: bytes, width: int) -> bool:
    """Whether `passage` is in `data` from the first byte of a token on."""
    place = data.find(passage)
    while place % width and place >= 0:
        place = data.find(passage, place + 1)
    return place >= 0


def _of(rows_RL: np.ndarray) -> dict[str, float]:
    rows: dict[str, Callable[[np.ndarray], float]] = {
        "type_token_ratio": type_token_ratio,
        "distinct_1": lambda ids: distinct(ids, 1),
        "distinct_2": lambda ids: distinct(ids, 2),
        "distinct_4": lambda ids: distinct(ids, 4),
        "repeated_4": lambda ids: repeated(ids, 4),
    }
    return {name: float(np.mean([measure(row) for row in rows_RL])) for name, measure in rows.items()}


def repetition(
    adapter: Adapter,
    ids_RL: np.ndarray,
    *,
    context: int = CONTEXT,
    chunk: int = 2048,
    batch: int = 8,
    training: np.ndarray | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures what the model writes after the first `context` of each row (R, L), as long as the row goes on; JSON-able. training: tokens of the
    training data, for the longest passage of it (None: not known)."""
    written, entropies, nats, passages = [], [], [], []
    for r, row in enumerate(ids_RL):
        if r % batch == 0:
            prompt_BC = torch.from_numpy(ids_RL[r : r + batch, :context])
            text_BA = adapter.greedy(prompt_BC, len(row) - context, chunk)
        written.append(text_BA[r % batch].numpy())
        entropies.append(_entropy(adapter, torch.cat([prompt_BC, text_BA], 1)[r % batch][None], context, chunk))
        adapter.stream(torch.from_numpy(row[None]), chunk, lambda first, nll, state: nats.append(nll.double().cpu().numpy().ravel()))
        if training is not None:
            passages.append(longest_passage(written[-1], training))
        if on_progress is not None:
            on_progress(r + 1, len(ids_RL))
    mean = float(np.concatenate(nats).mean())
    return {
        "prompts": len(ids_RL),
        "context": context,
        "written": ids_RL.shape[1] - context,
        **_of(np.stack(written)),
        "entropy": float(np.mean(entropies)),
        "citation": max(passages) if passages else None,
        "nats_per_token": mean,
        "perplexity": perplexity(mean),
        "of_text": _of(ids_RL[:, context:]),
    }


def _entropy(adapter: Adapter, ids_BT: torch.Tensor, context: int, chunk: int) -> float:
    """Mean entropy (nats) of the predictions of the tokens after the context, which is read as it was for writing them."""
    if adapter.reads_whole(ids_BT.shape[1] - 1):
        logits = adapter.logits(ids_BT[:, :-1], adapter.start(ids_BT.shape[0]))[0][:, context - 1 :]
    else:
        first_BV, state = adapter.prefill(ids_BT[:, :context], chunk)
        logits = torch.cat([first_BV[:, None], adapter.logits(ids_BT[:, context:-1], state)[0]], 1)
    log_p = logits.log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())
