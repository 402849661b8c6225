"""The board's plan: equal models, rates that widen, seeds that follow from results, and a queue that processes share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.files import write_json
from models.lm import LanguageModel
from scripts.board import __main__ as program
from scripts.board import architectures, corpus, work
from scripts.board.cells import BOARDS
from scripts.board.details import details_text
from scripts.board.draw import collect
from scripts.board.order import DECISIVE, DECISIVE_SEEDS, LEADERS, LEADERS_SEEDS, MOST_SEEDS
from scripts.board.plan import Plan
from scripts.board.queue import ABOUT, BETWEEN, COMPILING, READING, Queue, chosen_cells, expected_seconds
from scripts.board.rates import MOST_RATES
from scripts.board.results import Cell, Result
from tests.studies.board.made import results_of
from training.errors import UserError


@pytest.mark.parametrize("size", ["25m", "tiny"])
def test_models_of_a_size_have_equal_parameters_counted_in_one_way(size: str) -> None:
    aimed = architectures.SIZES[size].parameters
    for name in architectures.ARCHITECTURES:
        config = architectures.model_config(name, size, 512)
        with torch.device("meta"):
            model = LanguageModel(config)
        every = sum(p.numel() for p in model.parameters())
        assert architectures.parameters(config) == every - 512 * config.d_model
        assert abs(architectures.parameters(config) / aimed - 1) <= 0.02, name
        counted = architectures.counts(name, size, 64, 512)
        assert counted["training_flops_per_token"] == 3 * model.flops_per_token(64)
        assert architectures.ARCHITECTURES[name].instead in ("", *config.pattern)


def test_the_grid_widens_where_its_best_is_at_the_edge_and_decides_the_pass(data: Path) -> None:
    plan = Plan("tiny", str(data), ["gdn"])
    rates = list(BOARDS["tiny"].rates)

    def rates_after(loss: Callable[[Cell], float]) -> list[float]:
        known: dict[str, Result] = {}
        while True:
            cells = plan.tried("grid", "gdn", known)
            if all(cell.name in known for cell in cells):
                assert (plan.best_rate("pass", "gdn", known) or 0) == min(cells, key=loss).settings["lr"]
                return [cell.settings["lr"] for cell in cells]
            assert plan.best_rate("pass", "gdn", known) is None and plan.passes("gdn", known) == []
            known |= results_of(cells, loss)

    assert rates_after(lambda cell: abs(math.log(cell.settings["lr"] / rates[1]))) == rates
    assert rates_after(lambda cell: abs(math.log(cell.settings["lr"] / rates[2]))) == pytest.approx([*rates, 4 * rates[2]])
    assert rates_after(lambda cell: math.inf if cell.settings["lr"] > 1e-3 else 3 - cell.settings["lr"])[0] == pytest.approx(rates[0] / 16)
    assert len(rates_after(lambda cell: cell.settings["lr"])) == MOST_RATES


def test_the_pass_takes_the_rate_of_stage_1_where_it_is_known_and_asks_the_grid_for_the_others(data: Path) -> None:
    plan, known = Plan("tiny", str(data), ["gdn", "paragru"]), dict[str, Result]()
    for best, stage in ((8e-3, "stage0"), (2e-3, "stage1")):
        while plan.best_rate(stage, "gdn", known) is None:
            assert plan.best_rate("pass", "gdn", known) is None and {cell.row for cell in plan.cells(known, ["grid"])} == {"gdn", "paragru"}
            known |= results_of(plan.small(stage, "gdn", known)[0], partial(_distance, best))
    assert plan.best_rate("pass", "gdn", known) == pytest.approx(2e-3) and plan.best_rate("pass", "paragru", known) is None
    assert {cell.row for cell in plan.cells(known, ["grid"])} == {"paragru"}
    only = Plan("tiny", str(data), ["gdn", "paragru"], rates_only=True)
    assert {(c.row, c.stage, c.settings["seed"]) for c in only.cells(known, ["stage0", "stage1", "pass"])} == {
        *(("gdn", stage, 0) for stage in ("stage0", "stage1")),
        ("paragru", "stage0", 0),
        *(("gdn", "pass", seed) for seed in range(3)),
    }
    assert len(plan.cells(known, ["stage1"])) == len(only.cells(known, ["stage1"])) + 2
    assert [cell.name for cell in plan.cells(known, ["pass"])] == [f"pass.gdn@tiny.0.002.{seed}" for seed in range(3)]
    known |= results_of(plan.tried("grid", "paragru", known), partial(_distance, 8e-3))
    cells = plan.cells(known, ["pass"])
    assert plan.best_rate("pass", "paragru", known) == 8e-3
    # A row with its three seeds before the next, what decisive rows have beyond them behind all.
    assert [(cell.row, cell.settings["seed"]) for cell in cells] == [(row, seed) for row in ("gdn", "paragru") for seed in range(3)]
    assert {cell.settings["seed"] for cell in cells if work.reads_all(cell)} == {1}
    pair = Plan("tiny", str(data), ["gdn_hybrid", "gdn"])
    known |= results_of(pair.tried("grid", "gdn_hybrid", known), partial(_distance, 8e-3))
    assert [cell.name.split(".", 1)[0] + cell.row + str(cell.settings["seed"]) for cell in pair.cells(known, ["pass"])] == [
        *(f"pass{row}{seed}" for row in pair.rows for seed in range(3)),
        *(f"passgdn_hybrid{seed}" for seed in (3, 4)),
    ]
    known |= results_of(cells[:1], lambda cell: math.inf)  # a pass that diverged is run again at half the rate, wherever that came from
    assert plan.best_rate("pass", "gdn", known) == pytest.approx(1e-3)


def _distance(best: float, cell: Cell) -> float:
    return abs(math.log(cell.settings["lr"] / best))


def test_a_row_that_diverged_is_run_again_at_half_its_rate_and_then_stays(data: Path) -> None:
    plan = Plan("tiny", str(data), [*DECISIVE, "gdn"])
    known = results_of(plan.tried("grid", "gdn", {}), lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    cells = plan.passes("gdn", known)
    assert [cell.settings["lr"] for cell in cells] == [8e-3] * 3
    known |= results_of(cells, lambda cell: math.inf if cell.settings["seed"] == 2 else 1.0)
    halved = plan.passes("gdn", known)
    assert [cell.settings["lr"] for cell in halved] == [4e-3] * 3
    known |= results_of(halved, lambda cell: math.inf)
    assert [cell.settings["lr"] for cell in plan.passes("gdn", known)] == [4e-3] * 3
    known |= results_of(plan.tried("grid", "gdn_hybrid_paragru", {}), lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    known |= results_of(plan.tried("grid", "gdn_hybrid", {}), lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    assert len(plan.passes("gdn_hybrid_paragru", known)) == DECISIVE_SEEDS
    known |= results_of([plan.speed(row) for row in ("gdn_hybrid", "gdn_hybrid_paragru")], lambda cell: 1.0)
    known[plan.speed("gdn_hybrid").name].content["tokens_per_s"] = 1.5e5
    times = plan.equal_time("gdn_hybrid_paragru", known)
    assert [cell.row for cell in times] == ["gdn_hybrid"] * 3 and times[0].settings["steps"] == int(1.5 * 25_600) // 256


def test_stages_0_and_1_go_from_rates_to_seeds_to_equal_time_group_after_group(data: Path) -> None:
    rows = ["gdn_hybrid", "gdn_hybrid_paragru", "transformer"]
    plan = Plan("tiny", str(data), rows)
    known = results_of([plan.speed(row) for row in rows], lambda cell: 1.0)
    known[plan.speed("gdn_hybrid").name].content["tokens_per_s"] = 1.5e5
    stages = ["stage0", "time0", "stage1", "time1"]

    def loss(cell: Cell) -> float:
        if cell.stage == "stage0" and cell.row == "transformer" and cell.settings["seed"] == 2:
            return math.inf
        best = 2e-3 if cell.stage == "stage1" and cell.row == "gdn_hybrid" else 8e-3
        return abs(math.log(cell.settings["lr"] / best))

    waves = []
    while cells := [c for c in plan.cells(known, stages) if c.name not in known]:
        waves.append([cell.name for cell in cells])
        known |= results_of(cells, loss)
    pair = rows[:2]
    assert [name.split(".")[1] for name in waves[0]] == [f"{row}@tiny" for row in pair * 3 + ["transformer"] * 3]
    # At the rate that is known, of each row of a group, seed after seed; then the group's further seeds, equal time, and stage 1's two rates.
    seeds = [f"stage0.{row}@tiny.0.008.{s}" for s in range(1, 5) for row in pair]
    twenty = [f"stage0.gdn_hybrid@tiny.0.008.{seed}" for seed in range(5, MOST_SEEDS)]
    more = [f"stage0.gdn_hybrid_paragru@tiny.0.008.{seed}" for seed in range(5, MOST_SEEDS)]
    time0 = [f"time0_of_gdn_hybrid_paragru.gdn_hybrid@tiny.0.008.{seed}" for seed in range(5)]
    tried = [f"stage1.{row}@tiny.{rate}.0" for rate in ("0.008", "0.004") for row in pair]
    transformer = [f"{stage}.transformer@tiny.0.008.{seed}" for stage, seed in (("stage0", 1), ("stage0", 2))]
    alone = [f"stage1.transformer@tiny.{rate}.0" for rate in ("0.008", "0.004")]
    assert waves[1] == seeds + transformer + tried + time0 + twenty + alone + more
    # The hybrid's best rate of stage 1 was the lower one, so half of that is tried; the other row has its seeds, and those decide equal time. The
    # Transformer diverged in stage 0, and is run at half its rate in both. Where the best is the upper one of two, twice that is tried.
    rest, five = ([f"stage1.gdn_hybrid_paragru@tiny.0.008.{seed}" for seed in seeds] for seeds in ((1, 2), (3, 4)))
    half = [f"stage0.transformer@tiny.0.004.{seed}" for seed in range(3)]
    time1 = [f"time1.gdn_hybrid_paragru@tiny.0.008.{seed}" for seed in range(5)]
    one = "stage1.gdn_hybrid_paragru@tiny"
    assert waves[2] == [*half, "stage1.gdn_hybrid@tiny.0.002.0", f"{one}.0.016.0", "stage1.transformer@tiny.0.002.0"]
    assert waves[3] == ["stage1.gdn_hybrid@tiny.0.001.0", *rest, "stage1.transformer@tiny.0.016.0", *five, *time1]
    last = [f"stage1.{row}.{seed}" for row in ("gdn_hybrid@tiny.0.002", "transformer@tiny.0.008") for seed in (1, 2)]
    assert waves[4:] == [[*last, *(f"stage1.gdn_hybrid@tiny.0.002.{seed}" for seed in (3, 4))]]
    assert known[time0[0]].content["settings"]["steps"] == int(1.5 * 2560) // 256
    assert known[time1[0]].content["settings"]["steps"] == int(0.67 * (10_100 - 32)) // 256
    assert {work.reads_all(cell) for cell in plan.cells(known, stages) if cell.settings["seed"] != 1} == {False}
    for result in known.values():
        result.content.update(tokens=2560, seconds=4.0, curve=[])
    found = collect("tiny", list(known.values()), [])
    hybrid, other, plain = (found["rows"][row] for row in rows)
    assert [{cell["lr"] for cell in plain[stage].values()} for stage in ("stage0", "stage1")] == [{4e-3}, {8e-3}]
    assert len(hybrid["stage0"]) == MOST_SEEDS == 20 and len(other["time1"]) == 5
    assert {cell["lr"] for cell in hybrid["stage1"].values()} == {2e-3} and [cell["lr"] for cell in hybrid["rates1"]] == [
        1e-3,
        2e-3,
        4e-3,
        8e-3,
    ]
    text = details_text(found)
    assert "Stage 0: One layer of ParaGRU in GDN hybrid, at equal tokens: +0.0000" in text and "without seed 0" in text
    assert "a difference beyond 0.0000 is ruled out" in " ".join(text.split())
    assert "Stage 1: One layer of ParaGRU in GDN hybrid, at equal time: +0.0000" in text
    assert "| stage 0, 0.00256M tokens, 3 seeds or more | 2 of" in text
    # Before half of a rate was tried at 25M tokens its seeds there are no result; and a row that is no slower has no cells of equal time.
    del known["stage1.gdn_hybrid_paragru@tiny.0.004.0"]
    known[plan.speed("gdn_hybrid").name].content["tokens_per_s"] = 0.9e5
    for seed in range(5):
        del known[time0[seed]]
    found = collect("tiny", list(known.values()), [])
    assert not found["rows"]["gdn_hybrid_paragru"]["stage1"] and plan.equal_time0("gdn_hybrid_paragru", known) == []
    assert "at equal time: it trains at 1.11 times the speed of the other" in " ".join(details_text(found).split())


def test_a_row_without_stage_0_begins_with_the_upper_rates_and_named_cells_ask_for_no_other_stage(
    data: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    plan = Plan("tiny", str(data), ["paragru_hybrid"])
    tried = plan.tried("stage1", "paragru_hybrid", {})
    assert [cell.settings["lr"] for cell in tried] == pytest.approx([1.6e-2, 3.2e-2])
    known = results_of(tried, partial(_distance, 1.6e-2))
    assert [cell.settings["lr"] for cell in plan.tried("stage1", "paragru_hybrid", known)] == pytest.approx([8e-3, 1.6e-2, 3.2e-2])
    # With stage 1's rate the full pass is in the plan, and asks for more text than these shards have.
    corpus.part(data, tmp_path / "small")
    small = Plan("tiny", str(tmp_path / "small"), ["paragru_hybrid"])
    known = results_of([*small.tried("stage1", "paragru_hybrid", {})], partial(_distance, 1.6e-2))
    known |= results_of(small.tried("stage1", "paragru_hybrid", known), partial(_distance, 1.6e-2))
    small.board = replace(small.board, span=10**9)
    with pytest.raises(UserError, match="name the stages that need less with stages="):
        small.cells(known, values["stages"])
    name = tried[0].name
    assert [cell.name for cell in chosen_cells(values | {"only": [name]}, small, known)] == [name]


def test_processes_share_a_plan_and_run_no_cell_twice(data: Path, values: dict[str, Any]) -> None:
    """Two queues on one folder, as of two processes: what one holds the other does not get, a failed cell and its row come last, time is kept."""
    values = values | {"rows": ["gdn", "paragru"], "stages": ["stage0", "speed"], "whole": True}
    one, other = Queue(values, "cuda0"), Queue(values, "cuda1")
    taken = [queue.take() for queue in (one, other, one, other)]
    names = [cell.name for cell in taken if cell is not None]
    assert len(set(names)) == 4 and {name.split(".")[0] for name in names} == {"stage0"}
    for queue, cell in zip((one, other, one, other), taken):
        assert cell is not None
        queue.release(cell, failed=cell is taken[0])
    assert [cell.row for cell in (one.take(), other.take()) if cell is not None] == ["paragru"] * 2  # taken[0] was of the other
    held = list(one.held)
    assert one.take() is not None and len(one.held) == 2 and taken[0] is not None and taken[0].name not in [*one.held, *other.held]
    for queue in (one, other):
        for name in list(queue.held):
            queue.release(Cell("stage0", name, "", {}))
    one.forgive()
    assert held and (again := other.take()) is not None and again.name == taken[0].name
    # A program may have stages of its own that go first; the rest keeps the plan's order.
    timing = Queue(values | {"first": ["speed"]}, "cuda3").take()
    assert timing is not None and timing.stage == "speed"
    # With time for a speed cell but not for what a cell of this row took, the former is taken; it shares its device with nobody.
    done = results_of(Plan("tiny", str(data), values["rows"], values["precision"]).small("stage0", "paragru", {})[0][:2], lambda cell: 2.0)
    for name, result in done.items():
        write_json(Path(values["out"]) / "cells" / f"{name}.json", result.content | {"tokens_per_s": 2.56})
    late = Queue(values | {"until": time.time() + 100}, "cuda0")
    first = late.take()
    assert first is not None and first.stage == "speed" and late.take() is None
    [another] = [cell for cell in Plan("tiny", str(data), values["rows"]).cells({}, ["speed"]) if cell.name != first.name]
    assert not Queue(values, "cuda0")._lock(another) and Queue(values, "cuda2")._lock(another)
    # A training is expected to last as long as its row's best speed says, a row's first one as the slowest of all and a while to compile.
    known = {name: Result(name, result.content | {"tokens_per_s": speed}) for (name, result), speed in zip(done.items(), (2.56, 5.12))}
    plan = Plan("tiny", str(data), values["rows"], values["precision"])
    (mine, *_), (first_of_row, *_) = (plan.small("stage0", row, {})[0] for row in ("paragru", "gdn"))
    steps = 500 * (1 + BETWEEN)
    assert expected_seconds(mine, known) == pytest.approx(steps + ABOUT)
    assert expected_seconds(mine, known, 2) == pytest.approx(2 * steps + ABOUT)
    assert expected_seconds(first_of_row, known) == pytest.approx(steps + ABOUT + COMPILING)
    assert expected_seconds(plan.probe("gdn", "parity", 0), known) == 0.0 == expected_seconds(mine, {})
    # Of cells that shared a device the speed is a share; one that had it alone says more than they.
    shared = {name: Result(name, result.content | {"beside": 2}) for name, result in known.items()}
    assert expected_seconds(mine, shared) == pytest.approx(2560 / (2.56 + 5.12) * (1 + BETWEEN) + ABOUT)
    assert expected_seconds(mine, dict([*list(shared.items())[:1], *list(known.items())[1:]])) == pytest.approx(steps + ABOUT)
    # What is left is not all to be counted on where others halt this program for so long.
    for spare, taken in ((0.0, True), (20.0, False)):
        late = values | {"until": time.time() + steps + ABOUT + 15, "whole": True, "spare": spare, "least": 1.0}
        assert Queue(late, "cuda0")._time_for(mine, known) is taken


def test_leaders_are_the_rows_named_beforehand_at_their_rate_of_the_pass_one_seed_of_all_first(data: Path) -> None:
    rows = [*LEADERS, "mamba2"]
    known, each = dict[str, Result](), []
    for row, best in zip(rows, (8e-3, 2e-3, 8e-3, 8e-3, 8e-3)):
        plan = Plan("tiny", str(data), rows)
        while plan.best_rate("pass", row, known) is None:
            known |= results_of(plan.tried("grid", row, known), partial(_distance, best))
        each.append([(cell.row, cell.settings["seed"], cell.settings["lr"]) for cell in plan.leaders(known)])
    rates = dict(zip(LEADERS, (8e-3, 2e-3, 8e-3, 8e-3)))
    assert each[-1] == [(row, seed, pytest.approx(lr)) for seed in LEADERS_SEEDS for row, lr in rates.items()]
    assert [sorted({row for row, *_ in cells}) for cells in each] == [sorted(rows[:n]) for n in (1, 2, 3, 4, 4)]
    one = Plan("tiny", str(data), rows, seeds=1).cells(known, ["leaders"])
    assert [(cell.stage, cell.row, cell.settings["seed"]) for cell in one] == [("leaders", row, 1) for row in LEADERS]
    assert {cell.settings["steps"] for cell in one} == {BOARDS["tiny"].leaders_tokens // 256} and all(work.reads_all(cell) for cell in one)
    fast = {name: Result(name, result.content | {"tokens_per_s": 512.0}) for name, result in known.items()}
    assert expected_seconds(one[0], fast) == pytest.approx(100 * (1 + BETWEEN) + ABOUT + READING)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["rum"], "Say first what is to be done"),
        (["run", "rows=gnd"], "rows: did you mean 'gdn'"),
        (["run", "stages=grit"], "stages: did you mean 'grid'"),
        (["run", "first=sped"], "first: did you mean 'speed'"),
        (["run", "stages=speedrun"], "A speedrun needs speedrun_tokens"),
        (["run", "minutes=-1"], "minutes and spare must be zero or more"),
        (["plan", "size=7b"], "size is '7b'; choose one of"),
    ],
)
def test_mistakes_are_sentences(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        program.arguments(words)


def test_timings_and_probes_have_their_place_in_the_order_and_no_row_is_left_out(data: Path) -> None:
    plan = Plan("tiny", str(data), list(architectures.ARCHITECTURES))
    cells = plan.cells({}, ["stage0", "stage1", "speed", "probe"])
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.row for cell in cells if cell.stage == "stage0"} == set(architectures.ARCHITECTURES)
    stages = [cell.stage for cell in cells]
    last_of_ten = max(i for i, cell in enumerate(cells) if cell.stage == "stage0" and cell.row == "dense_lstm")
    assert "speed" not in stages[:last_of_ten] and cells[last_of_ten + 1].row == "transformer_muon"
    assert stages.index("probe") < max(i for i, stage in enumerate(stages) if stage == "stage0")
    first = [cell.settings["seed"] for cell in cells if cell.stage == "probe"]
    assert first == sorted(first)  # every row that is named with seed 0, before the other seeds
    assert [c.name for c in plan.cells({}, ["speed"])][:2] == ["speed.gdn_hybrid@tiny", "speed.gdn_hybrid_paragru@tiny"]


def test_cells_of_muon_count_while_its_update_is_the_same(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("tiny", str(data), ["gdn", "gdn_muon"])
    known = results_of([plan.small("stage0", row, {})[0][0] for row in plan.rows], lambda cell: 2.0)
    for result in known.values():
        result.content.update(tokens=2560, curve=[])
    assert sorted(collect("tiny", list(known.values()), [])["rows"]) == ["gdn", "gdn_muon"]
    monkeypatch.setattr("training.optim.newton_schulz.COEFFICIENTS", (2.0, -1.5, 0.5))
    assert sorted(collect("tiny", list(known.values()), [])["rows"]) == ["gdn"]
    mine = {row: plan.small("stage0", row, {})[0][0] for row in plan.rows}
    assert [known[cell.name].of(cell.settings) for cell in mine.values()] == [True, False]
