"""What every task shares: random numbers that are a pure function of (seed, split, sample), and the interface.

Sample k of a split has a 64-bit number of its own, seed | k | split side by side, so that no two of them, of whatever seeds and splits,
share a stream: evaluation can never draw from the stream of a training sample. The words of a stream are SplitMix64's
(Steele, Lea and Flood 2014). Dimensions: R rows (samples), T length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.errors import UserError

IGNORE = -100  # label of a position without an answer
SPLITS = ("train", "valid")
SEED_BITS, SAMPLE_BITS = 20, 43
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Draws:
    """The random streams of samples `k_R`; every call goes on where the last one stopped. Raises UserError outside the numbers' range."""

    def __init__(self, seed: int, split: str, k_R: np.ndarray) -> None:
        if split not in SPLITS:
            raise UserError(f"The split is {split!r}; choose train or valid.")
        if not 0 <= seed < 1 << SEED_BITS:
            raise UserError(f"The seed of generated data must be from 0 to {(1 << SEED_BITS) - 1}, not {seed}.")
        k_R = np.asarray(k_R)
        if k_R.size and not (0 <= int(k_R.min()) and int(k_R.max()) < 1 << SAMPLE_BITS):
            raise ValueError(f"Generated samples are numbered from 0 to {(1 << SAMPLE_BITS) - 1}.")
        number_R = np.uint64(seed) << np.uint64(SAMPLE_BITS + 1) | k_R.astype(np.uint64) << np.uint64(1) | np.uint64(SPLITS.index(split))
        self.state_R, self.used = _mix(number_R), 0

    @property
    def rows(self) -> int:
        return len(self.state_R)

    def words(self, n: int) -> np.ndarray:
        """The next n words of each sample, (R, n) uint64."""
        places = np.arange(self.used + 1, self.used + n + 1, dtype=np.uint64)
        self.used += n
        return _mix(self.state_R[:, None] + places * GAMMA)

    def below(self, n: int, bound: int) -> np.ndarray:
        """n numbers from 0 to bound - 1 for each sample, (R, n) int64."""
        return ((self.words(n) >> np.uint64(11)) % np.uint64(bound)).astype(np.int64)

    def order(self, n: int) -> np.ndarray:
        """A random order of range(n) for each sample, (R, n) int64."""
        return np.argsort(self.words(n), axis=1, kind="stable")


@dataclass
class Task:
    """Fields are the task's settings. `sample` makes rows of exactly T positions; only positions with an answer carry a label."""

    def problems(self) -> list[str]:
        """What is wrong with the settings, each 'field: ...' and one sentence."""
        return []

    def vocabulary(self) -> list[str]:
        """The name of every token, by id; names hold no spaces."""
        raise NotImplementedError

    def min_length(self) -> int:
        """The shortest sequence with an answer."""
        return 1

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, labels), both (R, T) int64. The label of position t is what the model must say after reading positions 0 to t."""
        raise NotImplementedError


def choose_problem(field: str, value: str, allowed: tuple[str, ...]) -> list[str]:
    return [] if value in allowed else [f"{field} is {value!r}; choose one of {', '.join(allowed)}."]


def least_problem(field: str, value: int, least: int) -> list[str]:
    return [] if value >= least else [f"{field} must be {least} or more, not {value}."]


def only_last(labels_RT: np.ndarray) -> np.ndarray:
    """The labels with all but each row's last answer taken out."""
    R, T = labels_RT.shape
    answered = labels_RT != IGNORE
    last_R = T - 1 - np.argmax(answered[:, ::-1], axis=1)
    result = np.full_like(labels_RT, IGNORE)
    rows = np.arange(R)
    result[rows, last_R] = labels_RT[rows, last_R]
    return result
