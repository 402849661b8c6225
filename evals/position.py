"""Loss by position in one pass over long sequences, in chunks with carried state; memory does not depend on the length for a recurrent model.

Buckets are log-spaced and local (a cumulative mean would hide a collapse). Published protocols: Stuffed Mamba (arXiv 2410.07145) feeds up
to 1M tokens and looks at the loss per position; LM-Infinite and Buitrago & Gu (arXiv 2507.02782) draw position curves on a log axis.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evals.adapters import Adapter
from evals.statistics import PositionSums


def position_curve(
    adapter: Adapter,
    rows_RT: np.ndarray,
    *,
    chunk: int = 2048,
    batch: int = 4,
    per_octave: int = 2,
    seed: int = 0,
    through: int = 0,
    bytes_per_token: float | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Scores rows (R, T+1) of token ids; {'buckets', 'nats_per_token', 'tokens', ...}. One pass over each row, state carried.

    through: a position that is to be a border of buckets (the training length).
    """
    R, T = rows_RT.shape[0], rows_RT.shape[1] - 1
    sums, start, done = PositionSums(T, R, per_octave, through=through), time.perf_counter(), 0
    if adapter.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(adapter.device)
    for row in range(0, R, batch):

        def each(first: int, nll: torch.Tensor, state: Any, row: int = row) -> None:
            nonlocal done
            sums.add(first, nll.float().cpu().numpy(), row)
            done += nll.numel()
            if on_progress:
                on_progress(done, R * T)

        adapter.stream(torch.from_numpy(rows_RT[row : row + batch]), chunk, each)
    seconds, nats = time.perf_counter() - start, float(sums.sums.sum() / sums.counts.sum())
    result: dict[str, Any] = {
        "length": T,
        "rows": R,
        "chunk": chunk,
        "nats_per_token": nats,
        "perplexity": float(np.exp(min(700.0, nats))),
        "tokens": int(sums.counts.sum()),
        "buckets": sums.buckets(seed),
        "seconds": seconds,
        "tokens_per_second": R * T / seconds,
    }
    if bytes_per_token:
        result["bits_per_byte"] = nats / np.log(2) / bytes_per_token
        result["bytes_per_token_of_the_text"] = bytes_per_token
    if adapter.device.type == "cuda":
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated(adapter.device)
    return result


def collapse(buckets: list[dict[str, Any]], train_length: int, inside: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Whether and where the loss turns up past the training length T, from a position curve.

    inside: buckets of a curve over many more rows of length T, where the few long rows say too little about the first T positions.
    delta = nats of a bucket beyond T - the mean nats over [T/2, T].
    onset_0.1, onset_0.5: start of the first of up to four successive buckets past T, all with delta above that (null: none).
    forgets_2x: the published test (arXiv 2410.07145, section 4.2): no bucket's loss beyond T exceeds twice the largest inside T. The
    bucket of the first tokens, where any model is bad, is left out of that largest loss: with it the test could hardly fail.
    """
    within = [b for b in (inside or buckets) if b["to"] <= train_length]
    beyond = [b for b in buckets if b["from"] >= train_length]
    if not within or not beyond:
        return {"verdict": "not measured: the curve does not reach past the training length", "train_length": train_length}
    near = [b for b in within if b["from"] >= train_length // 2] or within[-1:]
    level = sum(b["nats_per_token"] * b["tokens"] for b in near) / sum(b["tokens"] for b in near)
    most = max(b["nats_per_token"] for b in (within[1:] or within))
    delta = [b["nats_per_token"] - level for b in beyond]
    result: dict[str, Any] = {
        "train_length": train_length,
        "level_inside": level,
        "tokens_inside": sum(b["tokens"] for b in near),
        "largest_inside": most,
        "delta_at_end": delta[-1],
        "delta_largest": max(delta),
        "longest": beyond[-1]["to"],
        "forgets_2x": all(b["nats_per_token"] <= 2 * most for b in beyond),
    }
    for limit in (0.1, 0.5):
        run = [d > limit for d in delta]
        onset = next((beyond[i]["from"] for i in range(len(run)) if all(run[i : i + 4])), None)
        result[f"onset_{limit}"] = onset
    result["verdict"] = (
        "collapses (0.5 nat)" if result["onset_0.5"] is not None else "degrades (0.1 nat)" if result["onset_0.1"] is not None else "holds"
    )
    return result
