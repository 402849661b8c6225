"""Intervals and log-spaced buckets: what every figure of an evaluation is given with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of the 95 % interval of the proportion right/n (Wilson 1927), from 0 to 1; sensible at 0 and n as well. z: of the normal quantile."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap_ratio(sums: np.ndarray, counts: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the 95 % percentile interval of sum(sums)/sum(counts) when units (rows or blocks) are drawn with replacement.

    sums, counts: (units,). NaN of fewer than two units.
    """
    n = len(sums)
    if n < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    # Multinomial weights are what drawing n units with replacement counts up to; in blocks, for thousands of units.
    means = np.empty(draws)
    for a in range(0, draws, 100):
        weights = rng.multinomial(n, np.full(n, 1 / n), size=min(100, draws - a))
        means[a : a + 100] = (weights @ sums) / np.maximum(weights @ counts, 1e-9)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def log_edges(length: int, per_octave: int = 2, first: int = 16, through: int = 0) -> np.ndarray:
    """Bucket borders 0, first, first 2^(1/per_octave), ... that end exactly at `length`, all whole numbers.

    `through` is shifted in as a border, the others keeping their ratio to it. length 0 gives [0].
    """
    if first < through < length:
        first = round(through / 2 ** int(np.log2(through / first)))
    edges, k = [0], 0
    while (edge := round(first * 2 ** (k / per_octave))) < length:
        edges.append(edge)
        k += 1
    inside = [through, through // 2] if first < through < length else []
    return np.unique(np.array([*edges, *inside, length], dtype=np.int64))


class PositionSums:
    """Adds per-token losses (B, C) at positions first.. into log-spaced buckets, kept apart by row and block for the intervals."""

    BLOCK = 1024

    def __init__(self, length: int, rows: int, per_octave: int = 2, first: int = 16, through: int = 0) -> None:
        self.edges = log_edges(length, per_octave, first, through)
        borders = {int(e) for e in self.edges} | set(range(0, length, self.BLOCK))
        self.cells = np.array(sorted(borders))  # starts of cells: never across a bucket's border nor a block's
        self.cells = self.cells[self.cells < length]
        self.length = length
        self.sums, self.counts = np.zeros((rows, len(self.cells))), np.zeros((rows, len(self.cells)))

    def add(self, first: int, nll_BC: np.ndarray, first_row: int = 0) -> None:
        """Adds the losses of positions first .. first+C-1 of rows first_row .. first_row+B-1."""
        B, C = nll_BC.shape
        low, high = np.searchsorted(self.cells, [first, first + C], side="right") - 1
        if self.cells[high] == first + C:
            high -= 1
        starts = np.maximum(self.cells[low : high + 1] - first, 0)
        rows = slice(first_row, first_row + B)
        self.sums[rows, low : high + 1] += np.add.reduceat(nll_BC.astype(np.float64), starts, axis=1)
        self.counts[rows, low : high + 1] += np.diff(np.append(starts, C))

    def buckets(self, seed: int = 0, intervals: bool = True) -> list[dict[str, Any]]:
        """One row a bucket: from, to (exclusive), nats, its 95 % interval (bootstrap over rows, over blocks when there are few rows).

        intervals: False for rows that overlap, which no bootstrap may treat as independent."""
        which = np.searchsorted(self.edges, self.cells, side="right") - 1
        result = []
        for i in range(len(self.edges) - 1):
            s, n = self.sums[:, which == i], self.counts[:, which == i]
            if n.sum() == 0:
                continue
            bucket: dict[str, Any] = {
                "from": int(self.edges[i]),
                "to": int(self.edges[i + 1]),
                "nats_per_token": float(s.sum() / n.sum()),
                "tokens": int(n.sum()),
            }
            result.append(bucket)
            if not intervals:
                continue
            over_rows = s.shape[0] >= 8
            unit_sums, unit_counts = (s.sum(1), n.sum(1)) if over_rows else (s[n > 0], n[n > 0])
            low, high = bootstrap_ratio(unit_sums, unit_counts, seed=seed)
            bucket |= {"low": low, "high": high, "interval": "bootstrap over rows" if over_rows else "bootstrap over blocks"}
        return result
