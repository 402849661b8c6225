"""The plan of the board: which cells there are, in which order, and what decides the result of each.

A cell's settings hold all that its number depends on but the code and the device; a result counts as long as its settings are the plan's. The plan grows
with the results: a row's best rate in stage 1 or on the grid decides its cells of the full pass, a best rate at the edge asks for another rate, the leaders are
known when the full pass is. Stages: stage0, a small board of its own with a tenth of the tokens, and stage1, at stage 0's rates with four times as many,
each with its cells of equal time (time0, time1); then grid, speed, pass, time, probe, leaders; and speedrun, for which the command names tokens and rate.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data.fields import nearest
from scripts.board import rates as trying
from scripts.board.architectures import ARCHITECTURES, SIZES, model_config, update_of
from scripts.board.corpus import identity, training_tokens
from scripts.board.order import DECISIVE, DECISIVE0, DECISIVE_SEEDS, MORE_SEEDS, MUON, MUON_TIME_SEEDS, ORDER, SEEDS
from scripts.board.results import Cell, Result, final_loss, ratio_of_speed
from training.errors import UserError

STAGES = ("stage0", "time0", "stage1", "time1", "grid", "speed", "pass", "time", "probe", "leaders", "speedrun")
PROTOCOL = 3  # raise it when a number of the protocol changes: earlier results then count no more


@dataclass(frozen=True)
class Board:
    """The numbers of a size. tokens: of the full pass; the grid has a fifth of it, from the first `grid_span` tokens of the corpus, stage 0 a tenth, and
    stage 1 all of those first tokens. leaders_tokens: of the leaders' longer run. burst: steps of a timed burst. held_out_tokens: None for all."""

    T: int
    rows: int
    tokens: int
    span: int
    grid_span: int
    leaders_tokens: int
    rates: tuple[float, ...]
    contexts: tuple[int, ...]
    burst: int
    held_out_tokens: int | None
    measured_rows: int
    probe_steps: int
    probe_size: str
    vocabulary: int = 16_384


BOARDS = {
    "25m": Board(
        512,
        32,
        60_000_000,
        60_500_000,
        25_000_000,
        350_000_000,
        (1e-3, 2e-3, 4e-3),
        (1024, 131_072),
        30,
        None,
        8,
        2000,
        "probe",
    ),
    "tiny": Board(32, 8, 25_600, 60_000, 10_100, 51_200, (2e-3, 8e-3, 3.2e-2), (64, 256), 2, 8_000, 2, 20, "tiny_probe", 512),
}
BOARDS["125m"] = replace(BOARDS["25m"], rates=(5e-4, 1e-3, 2e-3))
GRID_SHARE, SHARE0, LEADERS = 0.2, 0.1, 4
TASKS: dict[str, dict[str, Any]] = {
    "mqar": {"name": "mqar", "pairs": 8, "symbols": 128},
    "parity": {"name": "parity"},
    "S3": {"name": "word_problem", "group": "s3"},
    "A5": {"name": "word_problem", "group": "a5"},
}
PROBE_T, PROBE_ROWS, PROBE_RATE, PROBE_LENGTHS = 64, 64, 2e-3, (1, 2, 4)
SPEEDRUN_TARGET = 1.7  # held-out bits per byte


class Plan:
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
        self.size, self.data, self.rows, self.precision, self.seeds, self.speedrun = size, data, rows, precision, seeds, speedrun
        self.board, self.rates_only = BOARDS[size], rates_only
        self.identities: dict[int, dict[str, Any]] = {}

    def _identity(self, span: int) -> dict[str, Any]:
        if span not in self.identities:
            self.identities[span] = identity(self.data, span)
        return self.identities[span]

    def _named(self, row: str) -> str:
        """The row in names of cells, which are those of all sizes."""
        return row if self.size == "25m" else f"{row}@{self.size}"

    def _common(self, row: str, size: str, vocabulary: int) -> dict[str, Any]:
        chosen = ARCHITECTURES[row]
        return {
            "protocol": PROTOCOL,
            "row": row,
            "model": _model_settings(row, size, vocabulary),
            "optimizer": chosen.optimizer,
            "initial": chosen.initial,
            "precision": self.precision,
            **update_of(chosen.optimizer),
        }

    def text(self, stage: str, row: str, tokens: int, span: int, lr: float, seed: int, note: str = "") -> Cell:
        """A language model's training."""
        board = self.board
        settings = self._common(row, self.size, board.vocabulary) | {
            "T": board.T,
            "rows": board.rows,
            "steps": tokens // (board.rows * board.T),
            "span": span,
            "lr": lr,
            "seed": seed,
            "held_out_tokens": board.held_out_tokens,
            "measured_rows": board.measured_rows,
            "data": self._identity(span),
        }
        return Cell(stage, f"{stage}{note}.{self._named(row)}.{lr:g}.{seed}", row, settings)

    def speed(self, row: str) -> Cell:
        board = self.board
        cell = self.text("speed", row, board.tokens, board.grid_span, board.rates[0], 0)
        cell.settings.update(burst=board.burst, contexts=list(board.contexts), seeds=1, logits="made again")
        return Cell("speed", f"speed.{self._named(row)}", row, cell.settings)

    def probe(self, row: str, task: str, seed: int) -> Cell:
        settings = self._common(row, self.board.probe_size, 256) | {
            "task": TASKS[task],
            "T": PROBE_T,
            "rows": PROBE_ROWS,
            "steps": self.board.probe_steps,
            "lr": PROBE_RATE,
            "seed": seed,
            "lengths": [PROBE_T * times for times in PROBE_LENGTHS],
        }
        return Cell("probe", f"probe.{task}.{self._named(row)}.{seed}", row, settings)

    # What follows from results

    @staticmethod
    def _best(cells: list[Cell], results: dict[str, Result], run: Callable[[float, int], Cell]) -> float | None:
        return trying.best(cells, results, lambda lr: [run(lr, seed) for seed in range(DECISIVE_SEEDS)])

    def grid(self, row: str, results: dict[str, Result]) -> list[Cell]:
        """The rates of the full pass tried so far, at a fifth of it, and the one to try next."""

        def cell(lr: float) -> Cell:
            return self.text("grid", row, int(GRID_SHARE * self.board.tokens), self.board.grid_span, lr, 0)

        return trying.widened(self.board.rates, cell, results)

    def rate(self, row: str, results: dict[str, Result]) -> float | None:
        """The rate of a row's full pass: the best of stage 1, which has more tokens than the grid, where it is known there. None: not known yet."""
        tried = self._tried1(row, results) if self.rate1(row, results) is not None else self.grid(row, results)
        return self._best(tried, results, lambda lr, seed: self._pass_cell(row, lr, seed))

    def _stage0_cell(self, row: str, lr: float, seed: int) -> Cell:
        return self.text("stage0", row, int(SHARE0 * self.board.tokens), self.board.grid_span, lr, seed)

    def _stage1_cell(self, row: str, lr: float, seed: int) -> Cell:
        return self.text("stage1", row, self.board.grid_span - self.board.T, self.board.grid_span, lr, seed)

    def _tried0(self, row: str, results: dict[str, Result]) -> list[Cell]:
        rates, factor = self.board.rates, self.board.rates[1] / self.board.rates[0]
        if row in MUON:  # the other rows under Muon were best at the highest of these, and worst at the lowest
            rates = tuple(rate * factor for rate in rates)
        return trying.widened(rates, lambda lr: self._stage0_cell(row, lr, 0), results)

    def _tried1(self, row: str, results: dict[str, Result]) -> list[Cell]:
        lr0 = self.rate0(row, results)
        return [] if lr0 is None else trying.widened((lr0 / 2, lr0), lambda lr: self._stage1_cell(row, lr, 0), results)

    def rate0(self, row: str, results: dict[str, Result]) -> float | None:
        """The rate of a row in stage 0. None: not known yet."""
        return self._best(self._tried0(row, results), results, partial(self._stage0_cell, row))

    def rate1(self, row: str, results: dict[str, Result]) -> float | None:
        """The rate of a row in stage 1. None: not known yet."""
        return self._best(self._tried1(row, results), results, partial(self._stage1_cell, row))

    @staticmethod
    def _then_seeds(tried: list[Cell], lr: float | None, run: Callable[[float, int], Cell], seeds: int) -> list[list[Cell]]:
        """The rates tried with seed 0, and, once the best is known, the other seeds at it."""
        if lr is None:
            return [tried] if tried else []
        rest = [run(lr, seed) for seed in range(seeds)]
        return [[*tried, *(cell for cell in rest[:1] if cell.name not in {t.name for t in tried})], rest[1:]]

    def stage0(self, row: str, results: dict[str, Result]) -> list[list[Cell]]:
        """A row of stage 0: its rates, then the other seeds, the one that is read first."""
        lr = self.rate0(row, results)
        return self._then_seeds(self._tried0(row, results), lr, partial(self._stage0_cell, row), self._seeds0(row))

    def stage1(self, row: str, results: dict[str, Result]) -> list[list[Cell]]:
        """A row of stage 1: its rate of stage 0, half of it, and the next one while the best lies at an edge; then the other seeds. The rate nearest to
        the grid's middle is first: where it is the best, it ends the others early."""
        middle, lr = math.log(self.board.rates[1]), self.rate1(row, results)
        tried = sorted(self._tried1(row, results), key=lambda cell: abs(math.log(cell.settings["lr"]) - middle))
        return self._then_seeds(tried, lr, partial(self._stage1_cell, row), self.seeds)

    def more(self, which: str, row: str, results: dict[str, Result]) -> list[Cell]:
        """Seeds of stage 0 or 1 beyond the usual ones, once the row's rate there is known."""
        stage, first, last = MORE_SEEDS[which]
        rate, run = (self.rate0, self._stage0_cell) if stage == "stage0" else (self.rate1, self._stage1_cell)
        lr = rate(row, results)
        return [] if lr is None else [run(row, lr, seed) for seed in range(first, last)]

    def _seeds0(self, row: str) -> int:
        return DECISIVE_SEEDS if row in DECISIVE0 and self.seeds >= SEEDS else self.seeds

    def small_cells(self, results: dict[str, Result], stages: list[str]) -> list[Cell]:
        """The cells of stages 0 and 1 known so far, what they are timed and asked by with them, in ORDER."""
        listed = {row for stage, group in ORDER for row in group if stage == "stage0"}
        rest = tuple(row for row in self.rows if row not in listed)
        cells: list[Cell] = []
        for stage, group in (*ORDER, ("stage0", rest)):
            rows = [row for row in group if row in self.rows]
            if stage in ("stage0", "stage1"):
                parts = [(self.stage0 if stage == "stage0" else self.stage1)(row, results) for row in rows]
                for number in range(1 if self.rates_only else 2):
                    cells += [c for turn in self._turns([part[number] for part in parts if len(part) > number]) for c in turn]
            elif stage in MORE_SEEDS and not self.rates_only:
                cells += [c for turn in self._turns([self.more(stage, row, results) for row in rows]) for c in turn]
            elif stage == "speed":
                cells += [self.speed(row) for row in rows]
            elif stage == "probe":
                cells += [self.probe(row, task, 0) for task in TASKS for row in rows] if stage in stages else []
            elif stage in ("time0", "time1"):
                cells += [cell for row in rows for cell in (self.equal_time0 if stage == "time0" else self.equal_time1)(row, results)]
        return list({cell.name: cell for cell in cells if cell.stage in stages}.values())

    def equal_time0(self, row: str, results: dict[str, Result]) -> list[Cell]:
        """For a row of stage 0 with one other layer: the row it is compared with, for as many tokens as it reads in the same time, where that is more."""
        of = ARCHITECTURES[row].of
        lr, ratio = (self.rate0(of, results), self._ratio(of, row, results)) if ARCHITECTURES[row].instead else (None, None)
        if lr is None or ratio is None or ratio <= 1.0:
            return []
        tokens, seeds = int(ratio * SHARE0 * self.board.tokens), MUON_TIME_SEEDS if row in MUON else self._seeds0(of)
        return [self.text("time0", of, tokens, self.board.grid_span, lr, seed, f"_of_{row}") for seed in range(seeds)]

    def equal_time1(self, row: str, results: dict[str, Result]) -> list[Cell]:
        """The same in stage 1, where no more text is there: the row itself, for as many tokens as it reads in the time of the one it is compared with."""
        of = ARCHITECTURES[row].of
        ratio = self._ratio(row, of, results) if ARCHITECTURES[row].instead else None
        lr = self.rate1(row, results)
        if ratio is None or ratio >= 1.0 or lr is None:
            return []
        span = self.board.grid_span
        return [self.text("time1", row, int(ratio * (span - self.board.T)), span, lr, seed) for seed in range(self._seeds0(row))]

    def _ratio(self, one: str, other: str, results: dict[str, Result]) -> float | None:
        """Training tokens/s of one row over another's, each alone on the device."""
        return ratio_of_speed(results, self.speed(one), self.speed(other))

    def _pass_cell(self, row: str, lr: float, seed: int) -> Cell:
        return self.text("pass", row, self.board.tokens, self.board.span, lr, seed)

    def passes(self, row: str, results: dict[str, Result]) -> list[Cell]:
        """The full pass at the row's rate, a cell a seed."""
        lr = self.rate(row, results)
        seeds = max(self.seeds, DECISIVE_SEEDS) if row in DECISIVE and self.seeds >= SEEDS else self.seeds
        return [] if lr is None else [self._pass_cell(row, lr, seed) for seed in range(seeds)]

    def equal_time(self, row: str, results: dict[str, Result]) -> list[Cell]:
        """For a row with one other layer: the row it is compared with, trained for as many tokens as it reads in the same time."""
        of = ARCHITECTURES[row].of
        if not ARCHITECTURES[row].instead:
            return []
        ratio, lr = ratio_of_speed(results, self.speed(of), self.speed(row)), self.rate(of, results)
        if ratio is None or lr is None:
            return []
        tokens = int(ratio * self.board.tokens)
        return [self.text("time", of, tokens, self.board.span, lr, seed, f"_of_{row}") for seed in range(self.seeds)]

    def leaders(self, results: dict[str, Result]) -> list[Cell]:
        """The longer run of the rows with AdamW and empty states that are best after the full pass, once all of them are done."""
        means: dict[str, float] = {}
        rows = [row for row in self.rows if not ARCHITECTURES[row].of]
        for row in rows:
            cells = self.passes(row, results)
            losses = [final_loss(results.get(cell.name), cell.settings) for cell in cells]
            known = [loss for loss in losses if loss is not None]
            if not cells or len(known) < len(losses):
                return []
            means[row] = statistics.fmean(known)
        best = sorted(means, key=means.__getitem__)[:LEADERS]
        board, cells = self.board, []
        for row in best:
            lr = self.rate(row, results)
            assert lr is not None
            cells += [self.text("leaders", row, board.leaders_tokens, board.span, lr, seed) for seed in range(self.seeds)]
        return cells

    def cells(self, results: dict[str, Result], stages: list[str]) -> list[Cell]:
        """All cells known so far, in the order in which they are run. A pass is only in it where the shards have its tokens."""
        made: dict[str, list[Cell]] = {
            "stage0": self.small_cells(results, stages),
            "grid": [
                cell
                for group in self._turns([self.grid(row, results) for row in self.rows if self.rate1(row, results) is None])
                for cell in group
            ],
            "speed": [self.speed(row) for row in self.rows if ARCHITECTURES[row].initial == "zero"] if "speed" in stages else [],
            "probe": [self.probe(row, task, seed) for seed in range(self.seeds) for task in TASKS for row in self._probed()]
            if "probe" in stages
            else [],
        }
        if {"pass", "time", "leaders"} & set(stages):
            made["pass"] = [c for group in self._turns([self.passes(row, results) for row in self.rows]) for c in group]
            made["time"] = [cell for row in self.rows for cell in self.equal_time(row, results)]
            made["leaders"] = self.leaders(results)
        tokens, lr = self.speedrun
        if tokens and lr:
            span = (
                self.board.span if training_tokens(self.data) >= self.board.span else self.board.grid_span
            )  # read again where tokens are more
            made["speedrun"] = [
                self.text("speedrun", row, tokens, span, lr, s, f".{tokens}") for s in range(self.seeds) for row in self.rows
            ]
        every = [cell for stage in STAGES if stage in stages or stage == "stage0" for cell in made.get(stage, [])]
        return list({cell.name: cell for cell in every}.values())  # some of speed and probe are in ORDER too

    def _probed(self) -> list[str]:
        """Rows of AdamW and an empty state: what a probe asks of is the mixers."""
        return [row for row in self.rows if (ARCHITECTURES[row].optimizer, ARCHITECTURES[row].initial) == ("adamw", "zero")]

    @staticmethod
    def _turns(groups: list[list[Cell]]) -> list[list[Cell]]:
        """The first cells of all groups, then the second ones: what breaks off early has something of every row."""
        longest = max((len(group) for group in groups), default=0)
        return [[group[i] for group in groups if i < len(group)] for i in range(longest)]


@functools.cache
def _model_settings(row: str, size: str, vocabulary: int) -> dict[str, Any]:
    """A model's configuration as settings hold it; nobody changes it. A plan asks for it a thousand times between two cells."""
    return model_config(row, size, vocabulary).to_dict()


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
