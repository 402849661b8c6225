"""The rates of a row: which are tried, which is the best of them, and when a try is ended because another rate is ahead (docs/board/protocol.md).

Tries of a row read the same windows in the same steps, so their training losses are compared point by point long before the end. A lower rate falls
further behind as the rate of both runs falls, a higher one catches up; so a higher one is given more steps and a wider margin.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

from scripts.board.results import OUTRUN, Cell, Result, final_loss

MOST_RATES = 7
WINDOW = 0.1  # of the steps, over which losses are compared
# Of a lower and a higher rate than the one it is compared with: the share of its steps from which on a try may end, and nats per token behind.
LOWER, HIGHER = (0.25, 0.05), (0.5, 0.1)
# Of a training curve's points: step, mean loss since the point before.
Curve = list[list[float]]


def behind(curve: Curve, ahead: Curve, steps: int) -> float | None:
    """Nats per token that `curve` lies above the other one over the last WINDOW of `steps` steps that it has; None where they share no point there."""
    if not curve:
        return None
    other = {int(step): loss for step, loss in ahead}
    both = [(loss, other[int(step)]) for step, loss in curve if step > curve[-1][0] - WINDOW * steps and int(step) in other]
    return statistics.fmean(one - two for one, two in both) if both else None


def outrun(curve: Curve, steps: int, lr: float, rival: Result | None) -> bool:
    """Whether a try at rate `lr` that has come as far as `curve` is to end, as `rival`, a finished try of the same row, stage and seed, is ahead."""
    if rival is None or not curve:
        return False
    share, margin = LOWER if lr < rival.content["settings"]["lr"] else HIGHER
    gap = behind(curve, rival.content.get("curve") or [], steps) if share * steps <= curve[-1][0] < steps else None
    return gap is not None and gap > margin


def widened(rates: tuple[float, ...], cell: Callable[[float], Cell], results: dict[str, Result]) -> list[Cell]:
    """The rates tried so far and the one to try next, beyond the edge where the best lies there, at most MOST_RATES; each with its rival."""
    tried, factor = list(rates), rates[1] / rates[0]
    while True:
        cells = [cell(lr) for lr in tried]
        losses = [final_loss(results.get(one.name), one.settings) for one in cells]
        known = [loss for loss in losses if loss is not None]
        best = losses.index(min(known)) if known else 0
        if len(known) < len(losses) or len(tried) >= MOST_RATES or 0 < best < len(tried) - 1:
            return [dataclasses.replace(one, rival=_rival(i, cells, losses, results)) for i, one in enumerate(cells)]
        tried = [tried[0] / factor, *tried] if best == 0 else [*tried, tried[-1] * factor]


def _rival(i: int, cells: list[Cell], losses: list[float | None], results: dict[str, Result]) -> Result | None:
    """What try `i` is compared with: the better one of the next rates on either side that are finished; of a try that was ended, the one that did it."""
    if losses[i] is not None:
        return results.get(results[cells[i].name].content.get("outrun_by", ""))
    sides = {loss: cells[k].name for k in (i - 1, i + 1) if 0 <= k < len(cells) and (loss := losses[k]) is not None and math.isfinite(loss)}
    return results[sides[min(sides)]] if sides else None


def best(cells: list[Cell], results: dict[str, Result], seeds: Callable[[float], list[Cell]]) -> float | None:
    """The best rate of these tries; half of it once one of the cells `seeds(rate)` at it has diverged. None: not known yet."""
    losses = [final_loss(results.get(cell.name), cell.settings) for cell in cells]
    known = [loss for loss in losses if loss is not None]
    if not cells or len(known) < len(losses):
        return None
    lr: float = cells[known.index(min(known))].settings["lr"]
    diverged = any(results[c.name].diverged for c in seeds(lr) if c.name in results and results[c.name].of(c.settings))
    return lr / 2 if diverged else lr


def said(content: dict[str, Any]) -> str:
    """What the table of rates says of a try that was ended: 'behind at 30 %' of its steps; empty of any other."""
    return f"behind at {content['steps'] / content['settings']['steps']:.0%}".replace("%", " %") if content.get("ended") == OUTRUN else ""
