"""The order of training data as arithmetic: a keyed permutation that is computed where it is needed, never stored or replayed."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


class Permutation:
    """A pseudorandom bijection of range(n), keyed by integers: a Feistel network over the next even power of two, with cycle walking."""

    def __init__(self, n: int, *key: int) -> None:
        if n < 1:
            raise ValueError(f"A permutation needs at least one element, not {n}.")
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)
        self.mask = np.uint64((1 << self.half) - 1)
        seed = hashlib.sha256(",".join(map(str, (n, *key))).encode()).digest()
        self.keys = [np.uint64(int.from_bytes(hashlib.sha256(seed + bytes([r])).digest()[:8], "little")) for r in range(ROUNDS)]

    def _round(self, value: np.ndarray, key: np.uint64) -> np.ndarray:
        mixed = (value ^ key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return (mixed ^ (mixed >> np.uint64(32))) & self.mask

    def _network(self, value: np.ndarray) -> np.ndarray:
        left, right = value >> np.uint64(self.half), value & self.mask
        for key in self.keys:
            left, right = right, left ^ self._round(right, key)
        return (left << np.uint64(self.half)) | right

    def __call__(self, index: int | np.ndarray) -> np.ndarray:
        """Images of `index` (0 <= index < n) as int64."""
        with np.errstate(over="ignore"):
            value = self._network(np.atleast_1d(np.asarray(index)).astype(np.uint64))
            outside = value >= self.n
            while outside.any():
                value[outside] = self._network(value[outside])
                outside = value >= self.n
        return value.astype(np.int64)


class Mixture:
    """Assigns global sample k to (source, index within it): exact quotas in every block of samples, shuffled inside the block."""

    def __init__(self, weights: list[float], seed: int, block: int = 1000) -> None:
        if not weights or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"Mixture weights must be zero or more with a positive sum, not {weights}.")
        share = np.asarray(weights, dtype=np.float64) / sum(weights) * block
        quota = np.floor(share).astype(np.int64)
        for i in np.argsort(quota - share, kind="stable")[: block - int(quota.sum())]:
            quota[i] += 1  # largest remainders
        self.quota, self.block, self.seed = quota, block, seed
        self.source = np.repeat(np.arange(len(weights)), quota)
        self.rank = np.concatenate([np.arange(q) for q in quota])

    def __call__(self, k: int) -> tuple[int, int]:
        block, place = divmod(k, self.block)
        if len(self.quota) == 1:
            return 0, k
        slot = int(Permutation(self.block, self.seed, 7, block)(place)[0])
        source = int(self.source[slot])
        return source, block * int(self.quota[source]) + int(self.rank[slot])
