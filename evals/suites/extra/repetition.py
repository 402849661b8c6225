"""suite=repetition: how much a model repeats itself and its training data when it writes greedily (evals/measures/repetition.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import ShardSet
from evals.adapters.base import ItemError
from evals.inputs.seen import facts_of_run
from evals.measures.repetition import CONTEXT, WRITTEN, repetition
from training.errors import UserError


def settings(subject: Any) -> dict[str, Any]:
    return {"prompts": subject.settings.rows or 32, "context": CONTEXT, "written": WRITTEN}


def measure(subject: Any, progress: Callable[[int, int], None]) -> dict[str, Any]:
    asked, tokens = settings(subject), len(subject.text.ids)
    if tokens < CONTEXT + WRITTEN:  # a ratio of fewer tokens would be another one
        raise ItemError(f"{subject.text.source} has {tokens:,} tokens, and the suite needs {CONTEXT + WRITTEN}; give a longer text.")
    ids_RL = subject.text.rows(*subject.text.fitting(asked["prompts"], CONTEXT + WRITTEN), subject.settings.seed)
    result = repetition(
        subject.adapter,
        ids_RL,
        chunk=subject.settings.chunk,
        batch=subject.settings.batch,
        training=_training(subject.path),
        on_progress=progress,
    )
    cited = f", longest passage of the training data {result['citation']} tokens" if result["citation"] is not None else ""
    return {
        **result,
        "summary": f"type-token ratio {result['type_token_ratio']:.2f} (text {result['of_text']['type_token_ratio']:.2f}), "
        f"4-grams written before {100 * result['repeated_4']:.0f} %, entropy {result['entropy']:.2f} nats{cited}; "
        f"held-out {result['nats_per_token']:.2f} nats a token",
    }


def _training(path: str) -> np.ndarray | None:
    """The tokens that the model was trained on, at most 20 million, where their shards are still there."""
    folders = (facts_of_run(path).get("run", {}).get("data") or {}).get("path") or []
    parts = []
    for folder in [folders] if isinstance(folders, str) else folders:
        if not Path(folder).is_dir():
            return None
        try:
            shards = ShardSet(folder, "train")
        except UserError:
            return None
        parts.append(shards.read(0, min(shards.n_tokens, 20_000_000)))
    return np.concatenate(parts)[:20_000_000] if parts else None
