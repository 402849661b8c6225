"""State tracking: the answer is the state of a finite automaton after each token. Dimensions: R rows, T length, G group elements."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from data.synthetic.task import IGNORE, Draws, Task, choose_problem, least_problem, only_last

WHERE = ("every", "last")
GROUPS = ("s3", "s4", "s5", "a4", "a5")


@dataclass
class Parity(Task):
    """Bits; the answer is the parity of all bits so far."""

    answers: str = "every"  # every: asked after each token | last: after the last one only

    def problems(self) -> list[str]:
        return choose_problem("answers", self.answers, WHERE)

    def vocabulary(self) -> list[str]:
        return ["0", "1"]

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        bits = draws.below(T, 2)
        labels = np.cumsum(bits, axis=1) % 2
        return bits, labels if self.answers == "every" else only_last(labels)


@dataclass
class CycleNavigation(Task):
    """Steps on a ring of `modulus` places: stay, forward, back (Deletang et al. 2023); the answer is the place."""

    modulus: int = 5
    answers: str = "every"

    def problems(self) -> list[str]:
        return least_problem("modulus", self.modulus, 2) + choose_problem("answers", self.answers, WHERE)

    def vocabulary(self) -> list[str]:
        return ["stay", "+1", "-1", *(str(i) for i in range(3, self.modulus))]  # the places share the ids 0 to modulus - 1

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        moves = draws.below(T, 3)
        labels = np.cumsum(np.array([0, 1, -1])[moves], axis=1) % self.modulus
        return moves, labels if self.answers == "every" else only_last(labels)


@dataclass
class ModularArithmetic(Task):
    """number, operator, number, operator, ... with + - * modulo `modulus`, worked from left to right without precedence.

    The answer, asked after each number, is the value so far.
    """

    modulus: int = 5
    answers: str = "every"

    def problems(self) -> list[str]:
        return least_problem("modulus", self.modulus, 2) + choose_problem("answers", self.answers, WHERE)

    def vocabulary(self) -> list[str]:
        return [*(str(i) for i in range(self.modulus)), "+", "-", "*"]

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        m = self.modulus
        inputs = np.where(np.arange(T) % 2, m + draws.below(T, 3), draws.below(T, m))
        labels = np.full_like(inputs, IGNORE)
        value = inputs[:, 0]
        labels[:, 0] = value
        for t in range(2, T, 2):
            operator, number = inputs[:, t - 1] - m, inputs[:, t]
            value = np.choose(operator, [value + number, value - number, value * number]) % m
            labels[:, t] = value
        return inputs, labels if self.answers == "every" else only_last(labels)


@functools.lru_cache(maxsize=8)
def group_table(group: str) -> np.ndarray:
    """(G, G) int64: entry [x, s] is the number of x after s, (x s)(i) = x(s(i)). Elements are in lexicographic order, the identity is 0."""
    n = int(group[1:])
    elements = np.array(list(itertools.permutations(range(n))))
    if group[0] == "a":
        pairs = itertools.combinations(range(n), 2)
        inversions = sum((elements[:, i] > elements[:, j]).astype(int) for i, j in pairs)
        elements = elements[np.asarray(inversions) % 2 == 0]
    number = {tuple(e): i for i, e in enumerate(elements.tolist())}
    return np.array([[number[tuple(x[s].tolist())] for s in elements] for x in elements])


@dataclass
class WordProblem(Task):
    """Tokens are all elements of a group; the answer is the product so far, each new element from the left (Liu et al. 2023)."""

    group: str = "s3"
    answers: str = "every"

    def problems(self) -> list[str]:
        return choose_problem("group", self.group, GROUPS) + choose_problem("answers", self.answers, WHERE)

    def vocabulary(self) -> list[str]:
        return [f"g{i}" for i in range(len(group_table(self.group)))]

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        table = group_table(self.group)
        inputs = draws.below(T, len(table))
        labels = np.empty_like(inputs)
        state = np.zeros(draws.rows, dtype=np.int64)
        for t in range(T):
            state = table[inputs[:, t], state]
            labels[:, t] = state
        return inputs, labels if self.answers == "every" else only_last(labels)
