"""Text from a model: the prompt is read in chunks in parallel, then one token at a time with the carried state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torch import Tensor

from kernels.moved import moved
from models.lm import LanguageModel
from models.sampling import Sampling, sample
from models.session import Session, left_pad

__all__ = ["Session", "generate", "left_pad", "sample"]


def generate(
    model: LanguageModel,
    prompt_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    stop_ids: Sequence[int] = (),
    lengths: Sequence[int] | None = None,
    stop_when: Callable[[int, int], bool] | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continues prompt_ids (B, T) int64 by up to max_new_tokens; returns prompt and continuation (B, T + n).

    lengths: row b is its last lengths[b] ids, padding before (see `left_pad`). A row ends with eos_id, one of stop_ids, or when
    stop_when(row, token) says so, and goes on with eos_id; generation ends when all have. Raises ValueError for an empty prompt or a
    sampling value out of its range.
    """
    session = Session(model, prompt_ids, lengths, seed)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = [*([] if eos_id is None else [eos_id]), *stop_ids]
    session.generate(max_new_tokens, sampling, stop_ids=stops, stop_when=stop_when, on_token=on_token)
    return session.ids_BT


if __name__ == "__main__":
    sys.exit(moved("scripts.generate"))
