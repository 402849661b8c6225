"""The study of state tracking at equal parameters: what its models have, its ladder of lengths, that a cell that was cut goes on, and its table."""

import argparse
import json
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.studies import equal, equal_cells
from scripts.studies.cells import build_model
from scripts.studies.equal import DEFAULTS, arguments, collect, limit_of, main, order, work
from scripts.studies.equal_cells import LENGTHS, MIXERS, TASKS, Learner, ladder, settings_of
from scripts.studies.equal_table import MARK, into_page, median, percent, table
from training.errors import UserError

VALUES = {**DEFAULTS, "length": 8, "batch": 8}


@pytest.mark.parametrize("task", ["S3", "mqar"])
def test_models_have_equal_parameters(task: str) -> None:
    layers = {name: settings_of(task, name, VALUES)["layer"] for name in MIXERS}
    counts = {name: sum(p.numel() for p in build_model([layer], 6, None).parameters()) for name, layer in layers.items()}
    assert max(counts.values()) < 1.12 * min(counts.values()), counts


def test_lengths_rise_to_the_whole() -> None:
    assert ladder(2, 1.4, 1, 16) == [2, 3, 4, 5, 7, 9, 12, 16] and ladder(2, 2.0, 11, 64) == [11, 22, 44, 64]


def test_rows_become_whole_and_every_cell_comes_once() -> None:
    places = order(arguments(["mixers=all", "long=dense_gru"]))
    assert places[:5] == [("A5", "dense_gru", 0), *(("S3", "dense_gru", seed) for seed in range(3)), ("S3", "dense_lstm", 0)]
    assert places.index(("S3", "transformer", 2)) < places.index(("parity", "dense_gru", 0)) < places.index(("2-hop", "dense_gru", 0))
    assert len(places) == len(set(places)) == 8 * len(MIXERS) * 3
    assert order(arguments(["tasks=S4,parity", "mixers=slstm,paragru", "seeds=1"]))[1:3] == [("S4", "paragru", 0), ("parity", "slstm", 0)]
    with pytest.raises(UserError, match="deltaproduct"):
        arguments(["mixers=deltaproducts"])


def test_a_cell_that_was_cut_goes_on() -> None:
    settings, device = settings_of("S3", "dense_gru", VALUES), torch.device("cpu")
    one = Learner(settings, 0, device, 200)
    one.warm()
    for _ in range(3):
        one.burst()
        one.look()
    again = Learner(settings, 1, device, 300)
    again.warm()
    again.load(one.state())
    assert again.progress.step == 30 and again.progress.limit == 300 and again.n == one.n
    for (name, a), b in zip(one.trainer.model.state_dict().items(), again.trainer.model.state_dict().values()):
        assert torch.equal(a, b), name
    again.burst()
    held, wanted = ({p: again.trainer.optimizer.state[p] for p in again.trainer.model.parameters()}, 40)
    assert all(int(v["step"]) == wanted for v in held.values())
    early = {key: value for key, value in one.state().items() if key != "waited"}  # its moments may be anything
    early["moments"] = {number: {name: v * torch.nan for name, v in held.items()} for number, held in early["moments"].items()}
    later = Learner(settings, 1, device, 300)
    later.load(early)
    later.burst()
    assert later.progress.step == 40 and torch.isfinite(later.loss_sum)


def test_the_rate_of_long_words_falls_and_begins_again_at_the_next_length() -> None:
    cell = Learner(settings_of("A5", "dense_gru", {**VALUES, "length": 32}), 0, torch.device("cpu"), 100_000)
    at = {"step": 1000, "arrived": 900, "rung": cell.rungs.index(7)}
    rates = []
    for changes in ({}, {"step": 1700}, {"arrived": 1700}, {"rung": len(cell.rungs) - 1}):
        at |= changes
        for key, value in at.items():
            setattr(cell.progress, key, value)
        rates.append(cell.rate())
    assert rates == pytest.approx([1e-2, 0.5e-2, 1e-2, 0.5e-2])  # 400 steps of 800; words of 32 at the root of 8 / 32


def test_the_rate_of_a_solved_cell_falls_from_where_it_was() -> None:
    cell = Learner(settings_of("A5", "dense_gru", {**VALUES, "length": 32}), 0, torch.device("cpu"), 20_000)
    cell.progress.arrived, cell.progress.rung, cell.progress.step = 4000, len(cell.rungs) - 1, 12_000
    before = cell.rate()  # 400 of 8,000 steps at this length
    rates = []
    cell.progress.solved = 12_000
    for step in (12_000, 12_000 + cell.fall // 2, 12_000 + cell.fall):
        cell.progress.step = step
        rates.append(cell.rate())
    assert before == pytest.approx(1e-2 * 0.5 * 400 / 8000) and rates == pytest.approx([before, before / 2, 0.0])


def test_the_rate_of_recall_falls_at_the_longest_length_alone() -> None:
    cell = Learner(settings_of("mqar", "dense_gru", {**VALUES, "length": 32}), 0, torch.device("cpu"), 100_000)
    rates = []
    for rung in (1, len(cell.rungs) - 1):
        cell.progress.step, cell.progress.arrived, cell.progress.rung = 1700, 900, rung
        rates.append(cell.rate())
    assert rates == pytest.approx([1e-2, 0.5e-2])


def recorded_cell(task: str, mixer: str, seed: int, ended: str, step: int, values: dict[str, Any]) -> dict[str, Any]:
    cell = {"task": task, "mixer": mixer, "seed": seed, "ended": ended, "step": step, "solved": step * (ended == "solved"), "limit": 1000}
    return {**cell, "settings": settings_of(task, mixer, values)}


def test_a_long_run_alone_is_in_the_table(tmp_path: Path) -> None:
    values = arguments(["tasks=", "mixers=", "long=dense_gru", f"out={tmp_path}"])
    (tmp_path / "cells").mkdir()
    cell = recorded_cell("A5", "dense_gru", 0, "time", 100, values)
    (tmp_path / "cells" / "A5.dense_gru.0.json").write_text(json.dumps(cell))
    assert collect(values) == [cell]


def test_cells_of_earlier_calls_are_joined_and_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = arguments(["tasks=S3,A5", "mixers=dense_gru,slstm", f"out={tmp_path}", f"known={tmp_path / 'old'}", "minutes=1", "device=cpu"])
    for folder in ("cells", "old"):
        (tmp_path / folder).mkdir()

    def cell(seed: int, ended: str, step: int, task: str = "S3", mixer: str = "slstm") -> dict[str, Any]:
        return recorded_cell(task, mixer, seed, ended, step, values)

    other = {**cell(2, "solved", 70), "settings": {"layer": {}}}  # of other settings
    first = {"environment": {"device": "cpu"}, "cells": [cell(0, "time", 900), cell(1, "steps", 800), cell(2, "time", 80), other]}
    second = {
        "runs": {
            "a": {
                "environment": {"device": "H200"},
                "cells": [
                    cell(0, "solved", 400),
                    {**cell(0, "steps", 9, mixer="dense_gru"), "task": "A5-long", "settings": settings_of("A5", "dense_gru", values)},
                ],
            }
        }
    }
    for name, table_ in (("first", first), ("second", second), ("others", {"cells": [{"task": "S3", "mixer": "slstm", "seed": 0}]})):
        (tmp_path / "old" / f"{name}.json").write_text(json.dumps(table_))
    (tmp_path / "cells" / "S3.slstm.1.json").write_text(json.dumps({**cell(1, "time", 850), "device": "H100"}))
    rows = [(c["task"], c["mixer"], c["seed"], c["ended"], c["step"], c["device"]) for c in collect(values)]
    assert rows == [
        ("S3", "slstm", 0, "solved", 400, "H200"),
        ("S3", "slstm", 1, "steps", 800, "cpu"),
        ("A5", "dense_gru", 0, "steps", 9, "H200"),
    ]
    trained: list[Any] = []
    monkeypatch.setattr(equal, "end_by", lambda *_: None)
    monkeypatch.setattr(equal, "report", lambda *_: None)

    class Spawn:
        Value = staticmethod(lambda *_: None)

        @staticmethod
        def Process(target: Any, args: Any) -> Any:
            trained.extend(args[1])
            return argparse.Namespace(start=lambda: None)

    monkeypatch.setattr(equal.multiprocessing, "get_context", lambda _: Spawn)
    main([f"{key}={','.join(map(str, v)) if isinstance(v, list) else v}" for key, v in values.items()])
    assert ("S3", "slstm", 2) in trained and ("A5", "dense_gru", 1) in trained
    assert not {("S3", "slstm", 0), ("S3", "slstm", 1), ("A5", "dense_gru", 0)} & set(trained)
    with pytest.raises(UserError, match="no folder"):
        main(["minutes=0", f"known={tmp_path / 'none'}", f"out={tmp_path}"])


def test_compilers_share_the_kinds_and_one_that_fails_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    class Fails(Learner):
        def warm(self) -> None:
            if self.settings["layer"]["type"] == "m2rnn":
                raise RuntimeError("no kernel")
            compiled.append(self.settings["layer"]["cell"])

    monkeypatch.setattr(equal, "Learner", Fails)
    monkeypatch.setattr(equal, "pick", lambda visible, device: torch.device("cpu"))
    monkeypatch.setattr(equal.signal, "signal", lambda *_: None)
    kinds = [(mixer, "parity", mixer) for mixer in ("paragru", "m2rnn", "dense_gru", "slstm")]
    begun, ready = multiprocessing.Value("i", 1), {kind: threading.Event() for kind, *_ in kinds}  # the first is another compiler's
    equal.prepare(VALUES, kinds, begun, "", ready)
    assert compiled == ["dense_gru", "slstm"] and [event.is_set() for event in ready.values()] == [False, True, True, True]


def test_the_page_holds_the_table_of_the_recorded_cells() -> None:
    results = Path(__file__).parents[2] / "docs/results"
    values = arguments(["known=" + str(results / "state_tracking"), "out=/nonexistent"])
    page = (results / "state_tracking.md").read_text().split(MARK)
    assert len(page) == 3 and page[1].strip() == table(collect(values), 64, LENGTHS)


def test_a_page_without_marks_is_refused_and_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"a\n{MARK}\nold\n{MARK}\nb\n")
    into_page(page, "new")
    assert page.read_text() == f"a\n{MARK}\nnew\n{MARK}\nb\n"
    page.write_text("nothing")
    with pytest.raises(UserError, match="two lines"):
        into_page(page, "new")
    assert page.read_text() == "nothing"


def test_controls_take_twice_the_steps_of_the_slowest_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal_cells, "SCORED", 16)
    values = {**VALUES, "out": str(tmp_path), "streams": 2, "most": 10}
    for folder in ("cells", "states"):
        (tmp_path / folder).mkdir()

    class Taken:
        value = 0

        def get_lock(self) -> Any:
            return torch.no_grad()

    class Compiled:
        asked = 0

        def is_set(self) -> bool:
            """Not at once: the other cell begins meanwhile."""
            self.asked += 1
            return self.asked > 2

    work(values, [("S3", "dense_gru", 0), ("S3", "paragru", 0)], Taken(), {"dense_gru": Compiled()}, 4e9, "cpu", "")
    cells = [json.loads(path.read_text()) for path in sorted((tmp_path / "cells").iterdir())]
    assert [c["ended"] for c in cells] == ["steps", "steps"] and all(c["step"] == 20 and c["device"] == "cpu" for c in cells)
    solved = [recorded_cell("S3", mixer, 0, "solved", steps, values) for mixer, steps in (("slstm", 700), ("slstm", 2900), ("slstm", 1300))]
    solved += [recorded_cell("S3", "dense_gru", 0, "solved", 900, values), recorded_cell("S3", "mamba2", 1, "solved", 1900, values)]
    assert limit_of(solved, ("S3", "mamba2", 0), 0) == 2600  # the median of the slower mixer, twice
    assert limit_of(solved[:1], ("S3", "mamba2", 0), 0) == 2000 and limit_of(solved, ("S3", "mamba2", 0), 50) == 50
    assert limit_of(solved, ("S3", "dense_gru", 0), 0) == TASKS["S3"]["steps"]
    assert limit_of(solved, ("S4", "mamba2", 0), 0) == TASKS["S4"]["steps"]


def test_a_cell_that_finds_no_memory_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**VALUES, "out": str(tmp_path), "streams": 1}
    (tmp_path / "cells").mkdir()
    asked: list[str] = []

    def begin(place: Any, *_: Any) -> Any:
        asked.append(place[1])
        raise RuntimeError("CUDA error: out of memory" if len(asked) < 3 else "a kernel is broken")

    class Taken:
        value = 0

        def get_lock(self) -> Any:
            return torch.no_grad()

    monkeypatch.setattr(equal, "begin", begin)
    monkeypatch.setattr(equal, "REST", 0.01)
    work(values, [("S3", "slstm", 0), ("S3", "dense_gru", 0)], Taken(), {}, 4e9, "cpu", "")
    assert asked == ["slstm", "slstm", "slstm", "dense_gru"]
    assert "broken" in json.loads((tmp_path / "cells" / "S3.slstm.0.json").read_text())["error"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["device=tpu"], "device is 'tpu'"), (["minutes=-1"], "zero or more"), (["tasks=", "mixers=all"], "Name a task"),
        (["length=4", "tasks=mqar"], "or more"), (["minutes=0", "tasks=S3"], "no finished cell"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_a_sentence_and_writes_nothing(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        main([*words, f"out={tmp_path / 'none'}"])
    assert not (tmp_path / "none").exists()


def test_table_and_plot_show_the_same_seed() -> None:
    cells = [
        {"seed": seed, "lengths": [{"accuracy": a}, {"accuracy": b}]} for seed, a, b in ((0, 1.0, 0.98), (1, 1.0, 0.58), (2, 1.0, 0.8))
    ]
    assert median(cells)["seed"] == 2
    assert [percent(a) for a in (0.9996, 0.9951, 0.984, 0.1751)] == ["100", "99.5", "98", "18"]


def test_the_table_says_what_ran_out_of_time() -> None:
    def cell(mixer: str, seed: int, accuracy: float, ended: str, step: int) -> dict[str, Any]:
        lengths = [{"length": 64 * m, "accuracy": accuracy / m, "chance": 0.17} for m in (1, 2)]
        solved = step if ended == "solved" else 0
        return {
            "task": "S3", "mixer": mixer, "seed": seed, "ended": ended, "lengths": lengths, "parameters": 31000, "step": step, "solved": solved,
        }  # fmt: skip

    cells = [cell("slstm", 0, 1.0, "solved", 500), cell("slstm", 1, 0.9, "time", 300), cell("mamba2", 0, 0.4, "steps", 1000)]
    cells += [{**cell("paragru", seed, 0.3, "time", 200 + seed), "device": "cpu"} for seed in range(2)]
    rows = table(cells, 64, (1, 2)).splitlines()
    assert "| slstm | 31,000 | **1/2** in 500; 100, 50; 1 cut at 300 |" in rows
    assert "| mamba2 | 31,000 | 0/1; 40, 20; 1,000 steps |" in rows and "| chance | | 17 |" in rows
    assert "| paragru | 31,000 | cut at 200 to 201; 30, 15 ° |" in rows
