"""Tries of rates that end early: never the better one, and what follows is what would have followed."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from scripts.board.details import details_text
from scripts.board.draw import collect
from scripts.board.plan import Plan
from scripts.board.rates import HIGHER, LOWER, WINDOW, outrun
from scripts.board.results import OUTRUN, Result
from tests.studies.board.made import results_of, run

KEPT = Path(__file__).parents[3] / "docs" / "board" / "cells.jsonl"


def _of(lr: float, curve: list[list[float]]) -> Result:
    return Result("rival", {"settings": {"lr": lr}, "curve": curve})


@pytest.mark.parametrize("lower", [True, False])
def test_a_try_ends_where_it_has_been_behind_by_the_margin_over_the_window(lower: bool) -> None:
    """Against the rule written out, over curves that part and come together again."""
    draw, steps = random.Random(0), 200
    share, margin = LOWER if lower else HIGHER
    ended = set()
    for _ in range(200):
        every = draw.choice([1, 2, 7])
        gap = [draw.uniform(-0.1, 0.3) * draw.random() for _ in range(0, steps, every)]
        ahead = [[(i + 1) * every, 5.0 - 0.01 * i] for i in range(len(gap))]
        curve = [[step, loss + g] for (step, loss), g in zip(ahead, gap)][: draw.randrange(1, len(gap))]
        at = int(curve[-1][0])
        last = [g for (step, _), g in zip(curve, gap) if step > at - WINDOW * steps]
        expected = at >= share * steps and at < steps and sum(last) / len(last) > margin
        assert outrun(curve, steps, 0.001, _of(0.002 if lower else 0.0005, ahead)) is expected
        ended.add(expected)
    assert ended == {True, False}
    assert not outrun(curve, steps, 0.001, None) and not outrun([], steps, 0.001, _of(0.002, ahead))


def test_no_try_that_was_kept_would_have_ended_and_been_the_better_one() -> None:
    """Of two rates next to one another that both ran to their ends, in the board's own results."""
    tries: dict[Any, dict[float, Result]] = {}
    for line in KEPT.read_text().splitlines():
        content = json.loads(line)
        settings = content["settings"]
        if content["stage"] in ("stage0", "stage1") and content["ended"] == "tokens":
            key = (content["stage"], content["row"], settings["seed"], settings["protocol"])
            tries.setdefault(key, {})[settings["lr"]] = Result(content["name"], content)
    ends = 0
    for of_row in tries.values():
        for (lr, one), (next_lr, other) in itertools.permutations(of_row.items(), 2):
            if 0.4 < lr / next_lr < 2.1:
                curve, steps = one.content["curve"], one.content["settings"]["steps"]
                if any(outrun(curve[:n], steps, lr, other) for n in range(1, len(curve) + 1)):
                    ends += 1
                    assert (one.bits_per_byte or 0) > (other.bits_per_byte or 0), one.name
    assert ends >= 40


def test_a_try_is_ended_by_its_better_neighbour_and_again_at_the_same_step(data: Path, values: dict[str, Any]) -> None:
    plan = Plan("tiny", str(data), ["paragru"])
    low, middle, high = plan.tried("grid", "paragru", {})
    assert low.rival is None
    known = results_of([middle], lambda cell: 1.0)
    for content in (known[middle.name].content,):
        content["curve"] = [[step, 1.0] for step in range(1, 21)]  # no model of this size comes near
    low, _, high = plan.tried("grid", "paragru", known)
    assert low.rival is known[middle.name] is high.rival
    result = run(low, values)
    assert result is not None and result["ended"] == OUTRUN and result["outrun_by"] == middle.name and not result["measured"]
    assert result["steps"] == 6 and result["curve"][-1][0] == 5  # a loss is read a step later than it is made
    known[low.name] = Result(low.name, json.loads((Path(values["out"]) / "cells" / f"{low.name}.json").read_text()))
    known |= results_of([high], lambda cell: 1.1)
    tried = plan.tried("grid", "paragru", known)
    assert len(tried) == 3 and plan.best_rate("pass", "paragru", known) == middle.settings["lr"]
    assert tried[0].rival is known[middle.name] and tried[1].rival is None and tried[2].rival is None
    for other in known.values():
        other.content.update({"tokens": 2560, "curve": [], "seconds": 1.0} | other.content)
    assert "| ParaGRU | 0.05M | behind at 30 % | **1.0000** | 1.1000 |" in details_text(collect("tiny", list(known.values()), []))
    again = run(tried[0], values)
    assert again is not None and [again[k] for k in ("curve", "weights_sha256", "ended")] == [
        result[k] for k in ("curve", "weights_sha256", "ended")
    ]
