"""What happens to the recurrent state over a long text: its statistics by layer and head, its retention, and what the model still remembers.

State collapse (Stuffed Mamba, arXiv 2410.07145): a state too large for the training length is never filled in training, so the model does not
learn to forget; past the training length the state's variance grows, few entries carry most of it, and the loss rises. evals/measures/position.py
has the criteria on the loss; this file looks at the state itself. Legend: B batch, G heads, E entries of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.adapters.base import Adapter, ItemError, LayerState, pieces, total_variation
from evals.cures.hooks import measure_retention
from evals.measures.statistics import log_edges


def head_statistics(state: LayerState, rank: bool = True) -> dict[str, list[float]]:
    """Figures of a state: for each name a list with one number a head, the mean over the batch.

    mean, variance (unbiased), largest (absolute value), norm; top: share of the sum of squares held by the largest 1 % of the entries (at
    least one); effective_rank: exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007), matrix states only.
    """
    x = state.entries
    energy = x.square()
    k = max(1, round(0.01 * x.shape[-1]))
    top = energy.topk(k, -1).values.sum(-1) / energy.sum(-1).clamp(min=1e-30)
    figures = {
        "mean": x.mean(-1),
        "variance": x.var(-1) if x.shape[-1] > 1 else torch.zeros_like(x[..., 0]),
        "largest": x.abs().amax(-1),
        "norm": energy.sum(-1).sqrt(),
        "top": top,
    }
    if rank and len(state.shape) == 2 and min(state.shape) > 1:
        values = torch.linalg.svdvals(x[:2].unflatten(-1, state.shape))  # two rows: this is the dear one
        p = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
        figures["effective_rank"] = torch.exp(-(p * p.clamp(min=1e-30).log()).sum(-1))
    return {name: value.double().mean(0).tolist() for name, value in figures.items()}


def state_curve(
    adapter: Adapter,
    rows_RT: np.ndarray,
    train_length: int,
    *,
    chunk: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Statistics of every recurrent state at log-spaced positions (the training length T among them) and retention up to T and to the end.

    rows_RT: ids of R rows; train_length: T, in tokens; chunk: tokens fed at once. Of retention, the product of alpha_{1..T} per head, the natural
    logarithm is given; horizon: -1 / mean ln alpha, tokens after which 1/e is left (null: nothing is ever lost). eigenvalues: of a delta rule's gates
    (`delta`) and updates (`delta_update`), mean, extremes and the share below zero, a head each. Raises ItemError for a model without a recurrent state, and for states that are not finite.
    """
    R, length = rows_RT.shape
    stops = sorted({int(e) for e in log_edges(length, 1, 64)[1:]} | ({train_length} if train_length < length else set()))
    ids, snapshots = torch.from_numpy(rows_RT), []
    adapter.check_length(length)
    if adapter.whole_beyond is not None and length > adapter.whole_beyond:
        raise ItemError(
            f"Positions of this model stretch with what is read at once beyond {adapter.whole_beyond:,} tokens, so {length:,} have no states on the way; "
            "ask for shorter lengths."
        )
    with measure_retention(adapter) as retention:
        at_T: dict[tuple[int, str], tuple[Tensor, int]] = {}
        state, at = adapter.start(R), 0
        for stop in stops:
            part = ids[:, at:stop]
            for a, b in pieces(part.shape[1], chunk):
                state = adapter.advance(part[:, a:b], state)
            at = stop
            states = adapter.layer_states(state)
            if not states:
                raise ItemError(f"{adapter.kind} has no recurrent state that can be read.")
            if bad := next((s for s in states if not bool(torch.isfinite(s.entries).all())), None):
                raise ItemError(f"The state {bad.name} of layer {bad.layer} is not finite after {stop:,} tokens.")
            snapshots.append({"position": stop, "states": [{"layer": s.layer, "name": s.name, **head_statistics(s)} for s in states]})
            if stop == train_length or not at_T:
                at_T = {key: (value.mean(0), retention.tokens[key]) for key, value in retention.totals.items()}
            if on_progress:
                on_progress(stop, length)
        retained = [_retention_row(key, value.mean(0), retention.tokens[key], *at_T[key]) for key, value in retention.totals.items()]
        for row in retained:
            if spread := retention.spread.get((row["layer"], row["name"])):
                row["eigenvalues"] = spread.figures()
    growth = _growth(snapshots, train_length)
    worst = max(growth, key=lambda g: g["variance_ratio"]) if growth else None
    return {
        "train_length": train_length,
        "length": length,
        "rows": R,
        "snapshots": snapshots,
        "retention": retained,
        "growth": growth,
        "summary": "one position only"
        if worst is None
        else f"largest growth of a head's variance from T to {length:,} tokens: x{worst['variance_ratio']:.3g} (layer {worst['layer']}, {worst['name']} {worst['head']})",
    }


def _retention_row(key: tuple[int, str], total: Tensor, tokens: int, total_T: Tensor, tokens_T: int) -> dict[str, Any]:
    """What the report shows of one layer's retention. total (heads,): the sum of ln(retention) over `tokens`; total_T, tokens_T: up to T."""
    mean = total / tokens
    horizons = [None if m > -1e-12 else -1 / m for m in mean.tolist()]
    log_T = total_T.tolist()
    many = len(log_T) > 256  # channels of a cell: quantiles instead of all of them
    shown = np.quantile(log_T, [0, 0.1, 0.5, 0.9, 1]).tolist() if many else log_T
    finite = [math.inf if h is None else h for h in horizons]
    return {
        "layer": key[0],
        "name": key[1],
        "log_retention_T": shown,
        "horizon": np.quantile(finite, [0, 0.1, 0.5, 0.9, 1], method="nearest").tolist() if many else horizons,
        "quantiles": [0, 0.1, 0.5, 0.9, 1] if many else None,
        "kept_half_T": float(np.mean([v > math.log(0.5) for v in log_T])),
        "tokens_T": tokens_T,
        "tokens": tokens,
    }


def _growth(snapshots: list[dict[str, Any]], T: int) -> list[dict[str, Any]]:
    """Variance at the end over variance at T (the last position up to T) for each head."""
    inside = [s for s in snapshots if s["position"] <= T]
    if not inside or snapshots[-1]["position"] <= T:
        return []
    rows = []
    for before, after in zip(inside[-1]["states"], snapshots[-1]["states"]):
        for head, (a, b) in enumerate(zip(before["variance"], after["variance"])):
            rows.append({"layer": before["layer"], "name": before["name"], "head": head, "variance_ratio": b / max(a, 1e-30)})
    return rows


def effective_remembrance(
    adapter: Adapter,
    rows_RT: np.ndarray,
    drops: list[int],
    *,
    chunk: int = 2048,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """EffRem_T(t): total variation distance of the next-token distributions after x[0:T] and after x[t:T], the prefix of t tokens dropped
    (Buitrago and Gu, arXiv 2507.02782), for each t in `drops`; means over the rows (R, T) of ids with a normal 95 % interval.

    Near 0 for small t is healthy: what lies far back does not decide; near 1 at small t is a model whose state was spoilt by its first tokens.
    Raises ItemError for a prefix that leaves less than two tokens.
    """
    R, T = rows_RT.shape
    ids, curve = torch.from_numpy(rows_RT), []
    whole, _ = adapter.prefill(ids, chunk)
    for i, t in enumerate(drops):
        if not 0 <= t < T - 1:
            raise ItemError(f"A prefix of {t} tokens cannot be dropped from {T}.")
        rest, _ = adapter.prefill(ids[:, t:], chunk)
        distance = total_variation(whole, rest).cpu().numpy()
        half = 1.96 * float(distance.std(ddof=1)) / math.sqrt(R) if R > 1 else float("nan")
        mean = float(distance.mean())
        curve.append({"dropped": t, "distance": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half)})
        if on_progress:
            on_progress(i + 1, len(drops))
    first = next((c["distance"] for c in curve if c["dropped"] > 0), curve[0]["distance"])
    return {
        "length": T,
        "rows": R,
        "curve": curve,
        "summary": f"distance {first:.3f} when the first {curve[1]['dropped'] if len(curve) > 1 else 0} tokens are dropped",
    }
