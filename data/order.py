"""The order of training data as arithmetic: a keyed permutation that is computed where it is needed, never stored or replayed."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from data.errors import UserError

ROUNDS = 6
LARGEST_BLOCK = 1_000_000


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
    """Assigns global sample k to (source, index within it): exact quotas in every block of samples, shuffled inside the block.

    A block has 1000 samples, or more (up to a million) where a small weight would get none of them.
    """

    def __init__(self, weights: list[float], seed: int, block: int | None = None) -> None:
        if not weights or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
            raise UserError(f"Mixture weights must be zero or more with a positive sum, not {weights}.")
        least = min(w for w in weights if w > 0) / sum(weights)
        if block is None:
            block = 1000
            while block * least < 1 and block < LARGEST_BLOCK:
                block *= 10
        share = np.asarray(weights, dtype=np.float64) / sum(weights) * block
        if block * least < 0.5:
            raise UserError(f"The smallest of the mixture weights {weights} is less than one sample in {block:,}; raise it or set it to 0.")
        quota = np.floor(share + 1e-9).astype(np.int64)
        for i in np.argsort(quota - share, kind="stable")[: block - int(quota.sum())]:
            quota[i] += 1  # largest remainders
        self.quota, self.block, self.seed = quota, block, seed
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _table(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of that source came before) of every place in a block. So a source's own order is that of k."""
        if block not in self._tables:
            if len(self._tables) >= 4:
                self._tables.pop(next(iter(self._tables)))
            slots = Permutation(self.block, self.seed, 7, block)(np.arange(self.block))
            source = np.repeat(np.arange(len(self.quota)), self.quota)[slots]
            rank = np.empty(self.block, dtype=np.int64)
            for i, quota in enumerate(self.quota.tolist()):
                rank[source == i] = np.arange(quota)
            self._tables[block] = source, rank
        return self._tables[block]

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index in source), both int64, of the global samples `k`."""
        k = np.asarray(k, dtype=np.int64)
        if len(self.quota) == 1:
            return np.zeros_like(k), k
        block, place = np.divmod(k, self.block)
        source, rank = np.empty_like(k), np.empty_like(k)
        for b in np.unique(block).tolist():
            chosen = block == b
            of_block, rank_of_block = self._table(b)
            source[chosen], rank[chosen] = of_block[place[chosen]], rank_of_block[place[chosen]]
        return source, block * self.quota[source] + rank

    def counts(self, n: int) -> np.ndarray:
        """How many of the samples 0 .. n-1 are of each source, int64."""
        block, place = divmod(n, self.block)
        if len(self.quota) == 1:
            return np.array([n], dtype=np.int64)
        part = self._table(block)[0][:place] if place else np.zeros(0, np.int64)
        return block * self.quota + np.bincount(part, minlength=len(self.quota))

    def __call__(self, k: int) -> tuple[int, int]:
        source, index = self.locate(np.array([k]))
        return int(source[0]), int(index[0])


class Blend:
    """A mixture whose weights changed during a run: those of `stretches` hold from their first sample on. Every source goes on with the sample
    after its last one, so that none is skipped and none repeated; with one stretch it is the Mixture itself.

    stretches: [(first sample, weights), ...], the first one from sample 0, in rising order.
    """

    def __init__(self, stretches: list[tuple[int, list[float]]], seed: int) -> None:
        self.first = [first for first, _ in stretches]
        if self.first[:1] != [0] or any(b <= a for a, b in zip(self.first, self.first[1:])):
            raise ValueError(f"The stretches of a mixture begin at sample 0 and rise, not at {self.first}.")
        self.mixtures = [Mixture(weights, seed) for _, weights in stretches]
        self.drawn = [np.zeros(len(stretches[0][1]), np.int64)]  # how many samples of each source were drawn before each stretch
        for mixture, a, b in zip(self.mixtures, self.first, self.first[1:]):
            self.drawn.append(self.drawn[-1] + mixture.counts(b - a))

    def locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, index in source), both int64, of the global samples `k`."""
        k = np.asarray(k, dtype=np.int64)
        if len(self.mixtures) == 1:
            return self.mixtures[0].locate(k)
        source, index = np.empty_like(k), np.empty_like(k)
        of_stretch = np.searchsorted(self.first, k, side="right") - 1
        for i in np.unique(of_stretch).tolist():
            chosen = of_stretch == i
            local_source, place = self.mixtures[i].locate(k[chosen] - self.first[i])
            source[chosen], index[chosen] = local_source, self.drawn[i][local_source] + place
        return source, index
