"""Held-out perplexity and bits per byte, whole and by position, in chunks with carried state.

The held-out stream is cut into rows of `length` tokens; a row is fed in chunks whose recurrent state (or KV cache) is carried on, so
memory does not depend on the length, and logits exist for a piece of a chunk only. B rows, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from data.byte_counts import bytes_of
from data.shards import ShardSet
from models.lm import LanguageModel, check_ids
from models.parallel import split
from models.prompt import prompt_of, read_at_once, told_by_prompt


@dataclass
class Perplexity:
    """Sums over the scored tokens, which add up over rows and ranks, and what follows from them."""

    nll_nats: float = 0.0  # summed over the tokens
    tokens: int = 0
    bytes: int = 0  # of UTF-8 that the tokens stand for
    by_position: dict[int, list[float]] = field(
        default_factory=dict
    )  # [nats, tokens] of log2 buckets of the place in the row, by first place
    length: int = 0  # of the longest row, where known

    @property
    def nats_per_token(self) -> float:
        """Mean loss."""
        return self.nll_nats / self.tokens if self.tokens else math.nan  # nothing is scored where a prompt is the whole text

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; finite."""
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Summed loss in bits over bytes: comparable between tokenizers."""
        return self.nll_nats / math.log(2) / self.bytes if self.tokens else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able; by_position: from and to are places in the row, both inclusive."""
        buckets = [
            {"from": low, "to": min(max(0, 2 * low - 1), (self.length or 2 * low + 1) - 1), "nats_per_token": s / n, "tokens": int(n)}
            for low, (s, n) in sorted(self.by_position.items())
        ]
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "by_position": buckets,
        }


def held_out_rows(shards: ShardSet, length: int, max_tokens: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens (n+1,), segment ids (n+1,)) rows of at most `length` inputs that cover the split once, up to `max_tokens` targets."""
    total = shards.n_tokens - 1
    budget = total if max_tokens is None else min(total, max_tokens)
    count = max(1, -(-budget // length))
    stride = max(length, total // count)  # a part of the split is taken evenly from all of it
    rows, taken = [], 0
    for start in range(0, total, stride):
        n = min(length, total - start, budget - taken)
        if n <= 0:
            break
        tokens_RL, segments_RL = shards.rows(np.array([start]), n + 1)
        rows.append((tokens_RL[0], segments_RL[0]))
        taken += n
    return rows


def text_bytes(shards: ShardSet, tokens: np.ndarray, scored: np.ndarray | None = None) -> int:
    """UTF-8 bytes that tokens[1:], of them those that are `scored`, stand for; marks around documents stand for none."""
    return max(1, bytes_of(shards.tokenizer(), tokens, shards.marks.end_ids, scored))


def bucket_sums(nll_BC: np.ndarray, first: int, into: dict[int, list[float]], scored_BC: np.ndarray | None = None) -> None:
    """Adds per-token losses at positions first, first+1, ..., those that are `scored` (None: all), to log2 buckets {lowest position: [sum, count]}."""
    positions = np.arange(first, first + nll_BC.shape[1])
    lows = np.where(positions == 0, 0, 2 ** np.floor(np.log2(np.maximum(positions, 1))).astype(np.int64))
    for low in np.unique(lows):
        chosen = nll_BC[:, lows == low]
        if scored_BC is not None:
            chosen = chosen[scored_BC[:, lows == low]]
            if not chosen.size:
                continue
        entry = into.setdefault(int(low), [0.0, 0.0])
        entry[0] += float(chosen.sum())
        entry[1] += chosen.size


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    shards: ShardSet,
    *,
    length: int = 2048,
    chunk: int = 512,
    batch: int = 8,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    precision: str = "fp32",
    slice_of: tuple[int, int] = (0, 1),
    process_group: Any = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Scores the held-out split with `model` on its own device: rows of `length` tokens, fed `chunk` tokens and `batch` rows at a time.

    max_tokens: scored in all, None for the whole split. Each rank takes its share of rows; sum the results over ranks.

    slice_of (n, N) and process_group: N ranks take the same rows, and this one the n-th slice of their time at once (models.parallel).
    Rows that N does not divide, or that are too short, are left to the first of them. Documents are reset at their starts as in training,
    so no token sees another document.
    """
    device = next(model.parameters()).device
    result = Perplexity()
    rows = held_out_rows(shards, length, max_tokens)
    result.length = max(len(tokens) - 1 for tokens, _ in rows)
    rows = rows[rank::world_size]
    rows.sort(key=lambda row: -len(row[0]))
    training = model.training
    model.eval()
    for begin in range(0, len(rows), batch):
        group = rows[begin : begin + batch]
        while group:  # rows of one length at a time: no padding anywhere
            same = [row for row in group if len(row[0]) == len(group[0][0])]
            group = group[len(same) :]
            part, rest = divmod(len(same[0][0]) - 1, slice_of[1])
            if slice_of[1] > 1 and not rest and not any(block.mixer.why_not_split(part) for block in model.blocks):
                with split(model, process_group):
                    _score(model, shards, same, chunk, precision, device, result, slice_of)
            elif slice_of[0] == 0:
                _score(model, shards, same, chunk, precision, device, result)
        if on_progress:
            on_progress(min(begin + batch, len(rows)), len(rows))
    model.train(training)
    return result


def _score(
    model: LanguageModel,
    shards: ShardSet,
    rows: list[tuple[np.ndarray, np.ndarray]],
    chunk: int,
    precision: str,
    device: torch.device,
    result: Perplexity,
    slice_of: tuple[int, int] = (0, 1),
) -> None:
    """Adds the rows, or of a slice of their time its part, to `result`."""
    tokens_BT = torch.from_numpy(np.stack([tokens for tokens, _ in rows]))
    check_ids(tokens_BT, model.config.vocab_size, str(shards.directory))
    tokens_BT = tokens_BT.to(device)
    segments_BT = torch.from_numpy(np.stack([segments for _, segments in rows])).to(device)
    n, N = tokens_BT.shape[1] - 1, slice_of[1]
    begin, end, chunk = slice_of[0] * n // N, (slice_of[0] + 1) * n // N, chunk if N == 1 else n // N
    prompt = prompt_of(model)
    several = bool((segments_BT != segments_BT[:, :1]).any())  # documents, whose prompts a border would cut
    chunk = n if prompt and several else max(chunk, read_at_once(model, n))
    told_BT = told_by_prompt(segments_BT[:, :-1], prompt)
    state = model.init_state(len(rows), device=device) if end - begin > chunk else None
    for first in range(begin, end, chunk):
        last = min(first + chunk, end)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(
                tokens_BT[:, first:last],
                labels=tokens_BT[:, first + 1 : last + 1],
                segment_ids=segments_BT[:, first:last],
                state=state,
                reduction="none",
            )
        state = output.state
        nll_BC, scored_BC = output.token_nll.float().cpu().numpy(), ~told_BT[:, first:last].cpu().numpy()
        result.nll_nats += float(nll_BC.sum(dtype=np.float64, where=scored_BC))
        result.tokens += int(scored_BC.sum())
        bucket_sums(nll_BC, first, result.by_position, scored_BC)
    for (tokens, _), told_T in zip(rows, told_BT.cpu().numpy()) if slice_of[0] == 0 else ():
        result.bytes += text_bytes(shards, tokens, ~told_T)
