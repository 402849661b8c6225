"""The cells of the board: the numbers of a size, and the settings that decide each cell's result.

A cell's settings hold all that its number depends on but the code and the device; a result counts as long as its settings are the plan's
(scripts/board/plan.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from scripts.board.architectures import ARCHITECTURES, model_config, update_of
from scripts.board.corpus import identity
from scripts.board.results import Cell

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
GRID_SHARE, SHARE0 = 0.2, 0.1
TASKS: dict[str, dict[str, Any]] = {
    "mqar": {"name": "mqar", "pairs": 8, "symbols": 128},
    "parity": {"name": "parity"},
    "S3": {"name": "word_problem", "group": "s3"},
    "A5": {"name": "word_problem", "group": "a5"},
}
PROBE_T, PROBE_ROWS, PROBE_RATE, PROBE_LENGTHS = 64, 64, 2e-3, (1, 2, 4)
SPEEDRUN_TARGET = 1.7  # held-out bits per byte


class Cells:
    """The cells of a size on the shards at `data`. precision: of matrix products on a GPU."""

    def __init__(self, size: str, data: str, precision: str = "bf16") -> None:
        self.size, self.data, self.precision, self.board = size, data, precision, BOARDS[size]
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

    def of_stage(self, stage: str, row: str, lr: float, seed: int) -> Cell:
        """A training of one of the stages that have a number of tokens: grid, stage0, stage1 and pass."""
        board = self.board
        span = board.span if stage == "pass" else board.grid_span
        return self.text(stage, row, tokens_of(board, stage), span, lr, seed)


def tokens_of(board: Board, stage: str) -> int:
    """Of a cell of a stage that has a number of them."""
    return {
        "stage0": int(SHARE0 * board.tokens),
        "stage1": board.grid_span - board.T,
        "grid": int(GRID_SHARE * board.tokens),
        "pass": board.tokens,
        "leaders": board.leaders_tokens,
    }[stage]


@functools.cache
def _model_settings(row: str, size: str, vocabulary: int) -> dict[str, Any]:
    """A model's configuration as settings hold it; nobody changes it. A plan asks for it a thousand times between two cells."""
    return model_config(row, size, vocabulary).to_dict()
