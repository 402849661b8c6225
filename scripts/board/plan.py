"""The plan of the board: which cells there are (scripts/board/cells.py), and in which order.

The plan grows with the results: a row's best rate in stage 1 or on the grid decides its cells of the full pass, a best rate at the edge asks for another
rate. Stages: stage0, a small board of its own with a tenth of the tokens, and stage1, with four times as
many, each with its cells of equal time (time0, time1); then grid, speed, pass, time, probe, leaders; and speedrun, for which the command names tokens and
rate.
"""

from __future__ import annotations

import math
from pathlib import Path

from data.fields import nearest
from scripts.board import rates as trying
from scripts.board.architectures import ARCHITECTURES, SIZES
from scripts.board.cells import BOARDS, SHARE0, TASKS, Cells
from scripts.board.corpus import training_tokens
from scripts.board.order import (
    DECISIVE,
    DECISIVE0,
    DECISIVE_SEEDS,
    LEADERS,
    LEADERS_SEEDS,
    MORE_SEEDS,
    MUON,
    MUON_TIME_SEEDS,
    NO_STAGE0,
    ORDER,
    SEEDS,
)
from scripts.board.results import Cell, Result, ratio_of_speed
from training.errors import UserError

STAGES = ("stage0", "time0", "stage1", "time1", "grid", "speed", "pass", "time", "probe", "leaders", "speedrun")
Results = dict[str, Result]  # what is finished, by name


class Plan(Cells):
    """The cells of a size on the shards at `data`. rows: those wanted. precision: of matrix products on a GPU. speedrun: tokens
    and rate of the cells of that stage. rates_only: of stages 0 and 1 no more than chooses a rate."""

    def __init__(
        self,
        size: str,
        data: str,
        rows: list[str],
        precision: str = "bf16",
        seeds: int = SEEDS,
        speedrun: tuple[int, float] = (0, 0.0),
        rates_only: bool = False,
    ) -> None:
        super().__init__(size, data, precision)
        self.rows, self.seeds, self.speedrun, self.rates_only = rows, seeds, speedrun, rates_only

    # Rates

    def tried(self, stage: str, row: str, results: Results) -> list[Cell]:
        """The rates of a row tried so far in stage 0, stage 1 or on the grid of the full pass, with seed 0, and the one to try next."""
        rates, factor = self.board.rates, self.board.rates[1] / self.board.rates[0]
        if stage == "stage0" and row in MUON:  # the other rows under Muon were best at the highest of these, and worst at the lowest
            rates = tuple(rate * factor for rate in rates)
        elif stage == "stage1":
            lr0 = rates[-1] if row in NO_STAGE0 else self.best_rate("stage0", row, results)
            if lr0 is None:
                return []
            rates = (lr0 / 2, lr0)
        cells = trying.widened(rates, lambda lr: self.of_stage(stage, row, lr, 0), results)
        if stage == "stage1":  # the one nearest to the grid's middle first: where it is the best, it ends the others early
            middle = math.log(self.board.rates[1])
            cells.sort(key=lambda cell: abs(math.log(cell.settings["lr"]) - middle))
        return cells

    def best_rate(self, stage: str, row: str, results: Results) -> float | None:
        """The rate of a row in stage 0, stage 1 or the full pass, which takes the best of stage 1, as that has more tokens than the grid, where it is
        known there. None: not known yet."""
        where = stage
        if stage == "pass":
            where = "stage1" if self.best_rate("stage1", row, results) is not None else "grid"
        tried = self.tried(where, row, results)
        return trying.best(tried, results, lambda lr: [self.of_stage(stage, row, lr, seed) for seed in range(DECISIVE_SEEDS)])

    # Stages 0 and 1

    def small(self, stage: str, row: str, results: Results) -> tuple[list[Cell], list[Cell]]:
        """A row of stage 0 or 1: (the rates tried with seed 0, the other seeds at the best one, once it is known)."""
        tried, lr = self.tried(stage, row, results), self.best_rate(stage, row, results)
        if lr is None:
            return tried, []
        seeds = DECISIVE_SEEDS if stage == "stage0" and row in DECISIVE0 and self.seeds >= SEEDS else self.seeds
        first, *rest = (self.of_stage(stage, row, lr, seed) for seed in range(seeds))
        return [*tried, *([first] if first.name not in {cell.name for cell in tried} else [])], rest

    def more(self, which: str, row: str, results: Results) -> list[Cell]:
        """Seeds of stage 0 or 1 beyond the usual ones, once the row's rate there is known."""
        stage, first, last = MORE_SEEDS[which]
        lr = self.best_rate(stage, row, results)
        return [] if lr is None else [self.of_stage(stage, row, lr, seed) for seed in range(first, last)]

    def small_cells(self, results: Results, stages: list[str]) -> list[Cell]:
        """The cells of stages 0 and 1 known so far, what they are timed and asked by with them, in ORDER."""
        listed = {row for stage, group in ORDER for row in group if stage == "stage0"}
        rest = tuple(row for row in self.rows if row not in listed)
        cells: list[Cell] = []
        for stage, group in (*ORDER, ("stage0", rest)):
            cells += self._group(stage, [row for row in group if row in self.rows], results, stages)
        return list({cell.name: cell for cell in cells if cell.stage in stages}.values())

    def _group(self, stage: str, rows: list[str], results: Results, stages: list[str]) -> list[Cell]:
        """An entry of ORDER."""
        if stage in ("stage0", "stage1"):
            rates, seeds = zip(*(self.small(stage, row, results) for row in rows)) if rows else ((), ())
            return self._turns(list(rates)) + ([] if self.rates_only else self._turns(list(seeds)))
        if stage in MORE_SEEDS:
            return [] if self.rates_only else self._turns([self.more(stage, row, results) for row in rows])
        if stage == "speed":
            return [self.speed(row) for row in rows]
        if stage == "probe":
            return [self.probe(row, task, 0) for task in TASKS for row in rows] if stage in stages else []
        equal = {"time0": self.equal_time0, "time1": self.equal_time1}[stage]
        return [cell for row in rows for cell in equal(row, results)]

    def equal_time0(self, row: str, results: Results) -> list[Cell]:
        """For a row of stage 0 with one other layer: the row it is compared with, for as many tokens as it reads in the same time, where that is more."""
        of = ARCHITECTURES[row].of
        lr, ratio = (self.best_rate("stage0", of, results), self._ratio(of, row, results)) if ARCHITECTURES[row].instead else (None, None)
        if lr is None or ratio is None or ratio <= 1.0:
            return []
        usual = DECISIVE_SEEDS if of in DECISIVE0 and self.seeds >= SEEDS else self.seeds
        tokens, seeds = int(ratio * SHARE0 * self.board.tokens), MUON_TIME_SEEDS if row in MUON else usual
        return [self.text("time0", of, tokens, self.board.grid_span, lr, seed, f"_of_{row}") for seed in range(seeds)]

    def equal_time1(self, row: str, results: Results) -> list[Cell]:
        """The same in stage 1, where no more text is there: the row itself, for as many tokens as it reads in the time of the one it is compared with."""
        of = ARCHITECTURES[row].of
        ratio = self._ratio(row, of, results) if ARCHITECTURES[row].instead else None
        lr = self.best_rate("stage1", row, results)
        if ratio is None or ratio >= 1.0 or lr is None:
            return []
        span, seeds = self.board.grid_span, DECISIVE_SEEDS if row in DECISIVE0 and self.seeds >= SEEDS else self.seeds
        return [self.text("time1", row, int(ratio * (span - self.board.T)), span, lr, seed) for seed in range(seeds)]

    def _ratio(self, one: str, other: str, results: Results) -> float | None:
        """Training tokens/s of one row over another's, each alone on the device."""
        return ratio_of_speed(results, self.speed(one), self.speed(other))

    # The full pass

    def passes(self, row: str, results: Results) -> list[Cell]:
        """The full pass at the row's rate, a cell a seed."""
        lr = self.best_rate("pass", row, results)
        seeds = max(self.seeds, DECISIVE_SEEDS) if row in DECISIVE and self.seeds >= SEEDS else self.seeds
        return [] if lr is None else [self.of_stage("pass", row, lr, seed) for seed in range(seeds)]

    def equal_time(self, row: str, results: Results) -> list[Cell]:
        """For a row with one other layer: the row it is compared with, trained for as many tokens as it reads in the same time."""
        of = ARCHITECTURES[row].of
        if not ARCHITECTURES[row].instead:
            return []
        ratio, lr = self._ratio(of, row, results), self.best_rate("pass", of, results)
        if ratio is None or lr is None:
            return []
        tokens = int(ratio * self.board.tokens)
        return [self.text("time", of, tokens, self.board.span, lr, seed, f"_of_{row}") for seed in range(self.seeds)]

    def leaders(self, results: Results) -> list[Cell]:
        """The longer run of the rows that LEADERS names, each at its rate of the full pass once that is known: a seed of all of them before the next."""
        board, rates = self.board, {row: self.best_rate("pass", row, results) for row in LEADERS if row in self.rows}
        seeds, known = LEADERS_SEEDS[: self.seeds], {row: lr for row, lr in rates.items() if lr is not None}
        return [self.text("leaders", row, board.leaders_tokens, board.span, lr, seed) for seed in seeds for row, lr in known.items()]

    def cells(self, results: Results, stages: list[str]) -> list[Cell]:
        """All cells known so far, in the order in which they are run. A pass is only in it where the shards have its tokens."""
        made: dict[str, list[Cell]] = {"stage0": self.small_cells(results, stages)}
        if "grid" in stages:
            unknown = [row for row in self.rows if self.best_rate("stage1", row, results) is None]
            made["grid"] = self._turns([self.tried("grid", row, results) for row in unknown])
        if "speed" in stages:
            made["speed"] = [self.speed(row) for row in self.rows if ARCHITECTURES[row].initial == "zero"]
        if "probe" in stages:
            made["probe"] = [self.probe(row, task, seed) for seed in range(self.seeds) for task in TASKS for row in self._probed()]
        if {"pass", "time", "leaders"} & set(stages):
            passes = [self.passes(row, results) for row in self.rows]
            # A row with all its seeds before the next: what time breaks off are rows, as two seeds say next to nothing of a third.
            made["pass"] = [cell for row in passes for cell in row[:SEEDS]] + self._turns([row[SEEDS:] for row in passes])
            made["time"] = [cell for row in self.rows for cell in self.equal_time(row, results)]
            made["leaders"] = self.leaders(results)
        tokens, lr = self.speedrun
        if tokens and lr:
            whole = training_tokens(self.data) >= self.board.span  # what there is is read again where tokens are more
            span, note = self.board.span if whole else self.board.grid_span, f".{tokens}"
            made["speedrun"] = [self.text("speedrun", row, tokens, span, lr, seed, note) for seed in range(self.seeds) for row in self.rows]
        every = [cell for stage in STAGES if stage in stages or stage == "stage0" for cell in made.get(stage, [])]
        return list({cell.name: cell for cell in every}.values())  # some of speed and probe are in ORDER too

    def _probed(self) -> list[str]:
        """Rows of AdamW and an empty state: what a probe asks of is the mixers."""
        return [row for row in self.rows if (ARCHITECTURES[row].optimizer, ARCHITECTURES[row].initial) == ("adamw", "zero")]

    @staticmethod
    def _turns(groups: list[list[Cell]]) -> list[Cell]:
        """The first cells of all groups, then the second ones: what breaks off early has something of every row."""
        longest = max((len(group) for group in groups), default=0)
        return [group[i] for i in range(longest) for group in groups if i < len(group)]


def rows_of(text: str) -> list[str]:
    """Names of rows from a list with commas between, or all. Raises UserError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "all")] or list(ARCHITECTURES)
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise UserError([f"rows: {nearest(name, list(ARCHITECTURES))} (there is no {name!r})" for name in unknown])
    return list(dict.fromkeys(names))


def check(size: str, data: str) -> None:
    """Raises UserError where there is no such size, or no shards of its vocabulary at `data`."""
    from data.shards import ShardSet

    if size not in BOARDS:
        raise UserError(f"size: {nearest(size, list(BOARDS))} (there is no {size!r})")
    assert size in SIZES
    if not (Path(data) / "meta.json").exists():
        raise UserError(f"{data} holds no token shards; make them with: python -m scripts.board corpus input=TEXT data={data}")
    shards, _ = ShardSet(Path(data), "train"), ShardSet(Path(data), "valid")
    if shards.vocab_size != BOARDS[size].vocabulary:
        raise UserError(f"{data} has a vocabulary of {shards.vocab_size:,}, the board of size {size} one of {BOARDS[size].vocabulary:,}.")
