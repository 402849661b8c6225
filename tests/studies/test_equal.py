"""The study of state tracking at equal parameters: what its models have, its ladder of lengths, that a cell that was cut goes on, and its table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.studies import equal_cells
from scripts.studies.cells import build_model
from scripts.studies.equal import DEFAULTS, arguments, collect, limit_of, main, order, work
from scripts.studies.equal_cells import MIXERS, TASKS, Learner, ladder, settings_of
from scripts.studies.equal_table import median, table
from training.errors import UserError

VALUES = {**DEFAULTS, "length": 8, "batch": 8}


@pytest.mark.parametrize("task", ["S3", "mqar"])
def test_models_have_equal_parameters(task: str) -> None:
    layers = {name: settings_of(task, name, VALUES)["layer"] for name in MIXERS}
    counts = {name: sum(p.numel() for p in build_model([layer], 6, None).parameters()) for name, layer in layers.items()}
    assert max(counts.values()) < 1.12 * min(counts.values()), counts


def test_lengths_rise_to_the_whole() -> None:
    assert ladder(2, 1.4, 1, 16) == [2, 3, 4, 5, 7, 9, 12, 16] and ladder(2, 2.0, 11, 64) == [11, 22, 44, 64]


def test_what_decides_comes_first_and_every_cell_once() -> None:
    values = arguments(["mixers=all", "long=dense_gru"])
    places = order(values)
    assert places[0] == ("A5-long", "dense_gru", 0) and places[1] == ("S3", "dense_gru", 0)
    assert places.index(("mod-5", "transformer", 0)) < places.index(("S3", "dense_gru", 1)) < places.index(("2-hop", "dense_gru", 0))
    assert len(places) == len(set(places)) == 1 + 8 * len(MIXERS) * 3
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
    cell = Learner(settings_of("A5-long", "dense_gru", {**VALUES, "length": 32}), 0, torch.device("cpu"), 100_000)
    at = {"step": 1000, "arrived": 900, "rung": cell.rungs.index(7)}
    rates = []
    for changes in ({}, {"step": 1700}, {"arrived": 1700}, {"rung": len(cell.rungs) - 1}):
        at |= changes
        for key, value in at.items():
            setattr(cell.progress, key, value)
        rates.append(cell.rate())
    assert rates == pytest.approx([1e-2, 0.5e-2, 1e-2, 0.5e-2])  # 400 steps of 800; words of 32 at the root of 8 / 32


def test_a_long_run_alone_is_in_the_table(tmp_path: Path) -> None:
    values = arguments(["tasks=", "mixers=", "long=dense_gru", f"out={tmp_path}"])
    (tmp_path / "cells").mkdir()
    cell = {"settings": settings_of("A5-long", "dense_gru", values)}
    (tmp_path / "cells" / "A5-long.dense_gru.0.json").write_text(json.dumps(cell))
    assert collect(values) == [cell]


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
    assert [c["ended"] for c in cells] == ["steps", "steps"] and all(c["step"] == 20 for c in cells)
    for seed, steps in enumerate((300, 700, 400)):
        (tmp_path / "cells" / f"S3.slstm.{seed}.json").write_text(json.dumps({"mixer": "slstm", "ended": "solved", "solved": steps}))
    assert limit_of(tmp_path, ("S3", "mamba2", 0), 0) == 1400
    assert limit_of(tmp_path, ("S3", "dense_gru", 0), 0) == TASKS["S3"]["steps"]
    assert limit_of(tmp_path, ("S4", "mamba2", 0), 0) == TASKS["S4"]["steps"]


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


def test_the_table_says_what_ran_out_of_time() -> None:
    def cell(mixer: str, seed: int, accuracy: float, ended: str, step: int) -> dict[str, Any]:
        lengths = [{"length": 64 * m, "accuracy": accuracy / m, "chance": 0.17} for m in (1, 2)]
        solved = step if ended == "solved" else 0
        return {
            "task": "S3", "mixer": mixer, "seed": seed, "ended": ended, "lengths": lengths, "parameters": 31000, "step": step, "solved": solved,
        }  # fmt: skip

    cells = [cell("slstm", 0, 1.0, "solved", 500), cell("slstm", 1, 0.9, "time", 300), cell("mamba2", 0, 0.4, "steps", 1000)]
    rows = table(cells, 64, (1, 2)).splitlines()
    assert "| slstm | 31,000 | **1/2** in 500; 100, 50; out of time: 1 at 300 |" in rows
    assert "| mamba2 | 31,000 | 0/1; 40, 20; 1,000 steps |" in rows and "| chance | | 17 |" in rows
