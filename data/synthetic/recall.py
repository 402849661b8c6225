"""Recall: the answer is a token seen earlier, found by its key, by its successor or by its place. Dimensions: R rows, T length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.synthetic.task import IGNORE, Draws, Task, choose_problem, least_problem, only_last

WHERE = ("every", "last")
RULES = ("hop", "successor")


@dataclass
class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023): `pairs` of key and value, then each key once more at a random place, where
    its value is asked for (and follows). Keys of a row differ; places between the queries hold random values, which are never keys.
    Half of the `symbols` are keys, half values.
    """

    pairs: int = 2
    symbols: int = 128

    def problems(self) -> list[str]:
        problems = least_problem("pairs", self.pairs, 1) + least_problem("symbols", self.symbols, 4)
        if not problems and self.symbols % 2:
            problems.append(f"symbols must be even (half of them are keys), not {self.symbols}.")
        if not problems and self.pairs > self.symbols // 2:
            problems.append(f"pairs is {self.pairs}, but {self.symbols} symbols give only {self.symbols // 2} different keys.")
        return problems

    def vocabulary(self) -> list[str]:
        half = self.symbols // 2
        return [f"k{i}" for i in range(half)] + [f"v{i}" for i in range(half)]

    def min_length(self) -> int:
        return 4 * self.pairs

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        half, P, rows = self.symbols // 2, self.pairs, np.arange(draws.rows)[:, None]
        keys, values = draws.order(half)[:, :P], half + draws.below(P, half)
        inputs = half + draws.below(T, half)
        inputs[:, 0 : 2 * P : 2], inputs[:, 1 : 2 * P : 2] = keys, values
        places = 2 * P + 2 * draws.order((T - 2 * P) // 2)[:, :P]
        inputs[rows, places], inputs[rows, places + 1] = keys, values
        labels = np.full_like(inputs, IGNORE)
        labels[rows, places] = values
        return inputs, labels


@dataclass
class KHop(Task):
    """Induction. rule "hop" (Sanford, Hsu and Telgarsky 2024): from position t go to the position after the last earlier occurrence of its
    token, `hops` times; the answer is the token there. Positions from where the way ends are not asked for.
    rule "successor": the answer is the token `hops` places after the last occurrence of this one, of those that are `hops` places or more
    back. With one hop both are the same; with two, the first asks for a look-up in what an earlier look-up gave.
    """

    hops: int = 1
    symbols: int = 10
    rule: str = "hop"
    answers: str = "every"

    def problems(self) -> list[str]:
        problems = least_problem("hops", self.hops, 1) + least_problem("symbols", self.symbols, 1)
        return problems + choose_problem("rule", self.rule, RULES) + choose_problem("answers", self.answers, WHERE)

    def vocabulary(self) -> list[str]:
        return [f"t{i}" for i in range(self.symbols)]

    def min_length(self) -> int:
        return self.hops * self.symbols + 1  # no two positions go to the same one, so each hop loses at most `symbols` more of them

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = draws.below(T, self.symbols)
        place = self._after(inputs, self.hops if self.rule == "successor" else 1)
        if self.rule == "hop":
            after, place = place, np.broadcast_to(np.arange(T), inputs.shape)
            for _ in range(self.hops):
                place = np.where(place < 0, -1, np.take_along_axis(after, np.maximum(place, 0), 1))
        labels = np.where(place < 0, IGNORE, np.take_along_axis(inputs, np.maximum(place, 0), 1))
        return inputs, labels if self.answers == "every" else only_last(labels)

    def _after(self, inputs: np.ndarray, distance: int) -> np.ndarray:
        """(R, T): `distance` places after the last occurrence of each token at least that far back, -1 where there is none."""
        after, rows = np.full_like(inputs, -1), np.arange(len(inputs))
        last = np.full((len(inputs), self.symbols), -1 - distance)
        for t in range(distance, inputs.shape[1]):
            last[rows, inputs[:, t - distance]] = t - distance
            after[:, t] = last[rows, inputs[:, t]] + distance
        return after


@dataclass
class KeepNth(Task):
    """The answer, asked after the n-th token and every later one, is the n-th token."""

    n: int = 5
    symbols: int = 128
    answers: str = "every"

    def problems(self) -> list[str]:
        problems = least_problem("n", self.n, 1) + least_problem("symbols", self.symbols, 2)
        return problems + choose_problem("answers", self.answers, WHERE)

    def vocabulary(self) -> list[str]:
        return [f"t{i}" for i in range(self.symbols)]

    def min_length(self) -> int:
        return self.n

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        inputs = draws.below(T, self.symbols)
        labels = np.full_like(inputs, IGNORE)
        labels[:, self.n - 1 if self.answers == "every" else T - 1 :] = inputs[:, self.n - 1, None]
        return inputs, labels


@dataclass
class Copying(Task):
    """`tokens` symbols, then as many marks at which they are asked for in order. selective: they lie scattered among blanks, so that
    what to keep depends on the content (Gu and Dao 2023); else they come first.
    """

    tokens: int = 8
    symbols: int = 14
    selective: bool = True

    def problems(self) -> list[str]:
        return least_problem("tokens", self.tokens, 1) + least_problem("symbols", self.symbols, 2)

    def vocabulary(self) -> list[str]:
        return [*(f"t{i}" for i in range(self.symbols)), "blank", "mark"]

    def min_length(self) -> int:
        return 2 * self.tokens

    def sample(self, draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        M, rows = self.tokens, np.arange(draws.rows)[:, None]
        symbols = draws.below(M, self.symbols)
        inputs = np.full((draws.rows, T), self.symbols)
        places = np.sort(draws.order(T - M)[:, :M], axis=1) if self.selective else np.arange(M)[None]
        inputs[rows, places] = symbols
        inputs[:, T - M :] = self.symbols + 1
        labels = np.full_like(inputs, IGNORE)
        labels[:, T - M :] = symbols
        return inputs, labels
