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

from evals.adapters.base import Adapter
from evals.measures.statistics import PositionSums


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
    """Loss by position of rows (R, T+1) of token ids, in one pass over each row: {'buckets', 'nats_per_token', 'tokens', ...}, JSON-able.

    chunk: tokens fed at once, with carried state; batch: rows; per_octave: buckets in a doubling of the position; through: a position that is to
    be a border of buckets (the training length); bytes_per_token: of the text, for bits per byte. Raises ItemError as `Adapter.stream` does.
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


def windows(
    adapter: Adapter, rows_RT: np.ndarray, train_length: int, *, chunk: int = 2048, batch: int = 64, seed: int = 0
) -> dict[str, Any]:
    """What the model makes of the same rows (R, L+1) when it only ever sees T tokens: windows of T that start afresh every T/2.

    by_place: buckets like those of `position_curve`, every token scored with T/2 to T tokens before it (in the first window with those
    there are), so that two curves over the same tokens can be compared, whatever the text is like there. inside: buckets by the place in
    the window, without intervals, as the windows overlap. Raises ItemError as `position_curve` does.
    """
    (R, wide), T = rows_RT.shape, train_length
    length, half = wide - 1, max(1, train_length // 2)
    starts = list(range(0, length - T + 1, half))
    if starts[-1] + T < length:
        starts.append(length - T)
    place, inside, covered = PositionSums(length, R, through=T), PositionSums(T, R * len(starts)), 0
    group = max(1, batch // R)
    for a in range(0, len(starts), group):
        part = starts[a : a + group]
        ids = np.concatenate([rows_RT[:, start : start + T + 1] for start in part])
        scored: list[np.ndarray] = []
        told: list[int] = []  # positions of the first token of each chunk

        def each(first: int, nll: torch.Tensor, state: Any, scored: list[np.ndarray] = scored, told: list[int] = told) -> None:
            scored.append(nll.float().cpu().numpy())
            told.append(first)

        adapter.stream(torch.from_numpy(ids), chunk, each)
        nll = np.concatenate(scored, 1)
        inside.add(told[0], nll, a * R)
        for i, start in enumerate(part):
            covered = max(covered, start + told[0])  # above `covered` where the model sees a prompt whole, which is not scored
            place.add(covered, nll[i * R : (i + 1) * R, covered - start - told[0] :])
            covered = start + T
    return {"by_place": place.buckets(seed), "inside": inside.buckets(seed, intervals=False), "windows": R * len(starts)}


def unigram_nats(rows: np.ndarray, text: np.ndarray, vocabulary: int) -> float:
    """Nats per token of the `rows`, which are cut from `text`, by a model that knows nothing but how often each token occurs in the rest of it.

    Every token is left out of its own count; kinds that do not occur otherwise share, evenly over the vocabulary, as much as new kinds turn up
    (Witten and Bell 1991).
    """
    kinds, counts = np.unique(text, return_counts=True)
    n = max(1, len(text) - 1)
    new = len(kinds) / (n + len(kinds))
    others = counts[np.minimum(np.searchsorted(kinds, rows.ravel()), len(kinds) - 1)] - 1
    return float(-np.log((1 - new) * others / n + new / max(vocabulary, len(kinds))).mean())


def unlearnt(nats: float, rows: np.ndarray, text: np.ndarray, vocabulary: int) -> str:
    """Why a model with that loss on the `rows` gets no verdict; '' for one that is better than a unigram of their text."""
    floor = unigram_nats(rows, text, vocabulary)
    return "" if nats < floor else f"the model is no better than a unigram of the text ({nats:.2f} nats per token, the unigram {floor:.2f})"


def unlearnt_rows(same: dict[str, Any] | None, rows_RT: np.ndarray, text: np.ndarray, vocabulary: int) -> str:
    """`unlearnt` of the rows (R, L+1) in windows of the training length, as `windows` found them; '' where there are none."""
    places = same["by_place"] if same else []
    if not places:
        return ""
    return unlearnt(
        sum(b["nats_per_token"] * b["tokens"] for b in places) / sum(b["tokens"] for b in places), rows_RT[:, 1:], text, vocabulary
    )


def collapse(
    buckets: list[dict[str, Any]], train_length: int, compared: dict[str, Any] | None = None, unlearnt: str = ""
) -> dict[str, Any]:
    """Whether and where the loss turns up past the training length T, from a position curve.

    compared: what `windows` gives for the same rows. delta of a bucket beyond T: its nats minus those of the same tokens in windows of T
    (without `compared`: minus the mean over [T/2, T], which also shows where the text itself gets harder).
    onset_0.1, onset_0.5: start of the first of up to four successive buckets past T, all with delta above that (null: none).
    forgets_2x: the published test (arXiv 2410.07145, section 4.2): no bucket's loss beyond T exceeds twice the largest inside T. The
    bucket of the first tokens, where any model is bad, is left out of that largest loss: with it the test could hardly fail.
    unlearnt: why the model is to get no verdict, e.g. that it is no better than a unigram: a loss that cannot get worse holds at any length.
    """
    within = [b for b in (compared["inside"] if compared else buckets) if b["to"] <= train_length]
    beyond = [b for b in buckets if b["from"] >= train_length]
    if not within or not beyond:
        return {"verdict": "not measured: the curve does not reach past the training length", "train_length": train_length}
    near = [b for b in within if b["from"] >= train_length // 2] or within[-1:]
    level = sum(b["nats_per_token"] * b["tokens"] for b in near) / sum(b["tokens"] for b in near)
    most = max(b["nats_per_token"] for b in (within[1:] or within))
    same = {b["to"]: b["nats_per_token"] for b in compared["by_place"]} if compared else {}
    delta = [b["nats_per_token"] - same.get(b["to"], level) for b in beyond]
    result: dict[str, Any] = {
        "train_length": train_length,
        "level_inside": level,
        "tokens_inside": sum(b["tokens"] for b in near),
        "largest_inside": most,
        "delta": delta,
        "delta_at_end": delta[-1],
        "delta_largest": max(delta),
        "longest": beyond[-1]["to"],
        "forgets_2x": None if unlearnt else all(b["nats_per_token"] <= 2 * most for b in beyond),
    }
    for limit in (0.1, 0.5):
        run = [d > limit for d in delta]
        onset = next((beyond[i]["from"] for i in range(len(run)) if all(run[i : i + 4])), None)
        result[f"onset_{limit}"] = onset
    result["verdict"] = (
        f"no verdict: {unlearnt}"
        if unlearnt
        else (
            "collapses (0.5 nat)"
            if result["onset_0.5"] is not None
            else "degrades (0.1 nat)"
            if result["onset_0.1"] is not None
            else "holds"
        )
    )
    return result
