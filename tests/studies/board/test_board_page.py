"""The board's page: answers in their order, a whole way from cells to the page, and folders with cards."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.files import write_json
from scripts.board import __main__ as program
from scripts.board import measure
from scripts.board.answers import Question, all_answers, answer
from scripts.board.cells import BOARDS
from scripts.board.details import details_text
from scripts.board.draw import collect, draw
from scripts.board.expected import expectation_lines, expectations
from scripts.board.export import export_cells
from scripts.board.longer import longer_answer, longer_table, with_passkey
from scripts.board.order import LEADERS
from scripts.board.page import page_text
from scripts.board.plan import Plan
from scripts.board.results import Cell, Result, gather_passkey
from scripts.board.summary import ranking, whole
from tests.studies.board.made import results_of, run
from training.errors import UserError


def test_answers_say_nulls_and_what_went_against_the_expectation_first() -> None:
    def row(*values: float) -> dict[str, Any]:
        return {"pass": {str(i): {"bits_per_byte": v, "verdict": "holds", "curve": []} for i, v in enumerate(values)}}

    rows = {
        "gdn": row(1.4, 1.5, 1.6),
        "mamba2": row(1.5, 1.6, 1.7),
        "transformer": row(1.45, 1.5, 1.6),
        "gdn_hybrid": row(1.41, 1.49, 1.60),
    }
    better = answer(rows, Question("G", "gdn", "mamba2", -1))
    assert "-0.1000" in better.text and better.text.endswith("better, in pairs; not over all seeds.") and not better.negative
    against = answer(rows, Question("M", "mamba2", "gdn", -1))
    assert against.negative and "against what was expected" in against.text
    null = answer(rows, Question("H", "gdn_hybrid", "gdn", 0))
    assert null.negative and "no difference is shown; the interval is wider than 0.01" in null.text
    assert not answer(rows, Question("P", "paragru", "gdn", 0)).known
    # Where one row has more seeds the interval over all of them decides: scipy.stats.ttest_ind(equal_var=False) has -0.1136 to 0.0403 with 6.77 degrees
    # of freedom; with the quantile of 6 it is this one.
    uneven = answer({"gdn": row(1.4, 1.5, 1.6, 1.45, 1.55, 1.5), "mamba2": row(1.51, 1.56, 1.54)}, Question("U", "gdn", "mamba2", 0))
    assert "over all seeds, not in pairs, -0.0367 (-0.1157 to +0.0424, 6 and 3 seeds)" in uneven.text
    said = dict(expectations(rows))
    [order_of_three] = said["Gated DeltaNet is ahead of Mamba-2, Mamba-2 of ParaLSTM and ParaGRU"]
    assert order_of_three == "GDN minus Mamba-2: the full pass: held, -0.1000 (-0.1000 to -0.1000, 3 seeds)"
    hybrids = said["Hybrids are ahead of their recurrent rows, and of the Transformer, by 0.01 to 0.03"]
    assert (
        hybrids[0].startswith("GDN hybrid minus Gated DeltaNet: the full pass: open")
        and not said["State passing costs nothing within the interval"]
    )
    assert any(line.endswith("| not answered yet |") for line in expectation_lines(rows))
    order = [(a.known, a.negative) for a in all_answers(rows)]
    assert order == sorted(order, key=lambda pair: (not pair[0], not pair[1])) and (True, True) in order and (True, False) in order


def test_the_first_answer_ranks_whole_rows_of_one_stage_and_tells_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(*values: float) -> dict[str, Any]:
        return {"stage0": {}, "pass": {str(i): {"bits_per_byte": v} for i, v in enumerate(values)}}

    rows = {
        "transformer": row(1.50, 1.51, 1.52),
        "gdn_hybrid": row(1.40, 1.41, 1.42),
        "gdn": row(1.48, 1.55, 1.50),
        "paragru": row(1.60, 1.61, 1.62),
        "paragru_hybrid": row(1.41, 1.38, 1.46),
        "mamba2": row(1.0, 1.0),  # two seeds are no row
    }
    found = {"rows": rows, "tokens": {"pass": 60e6, "stage1": 25e6, "stage0": 6e6}}
    assert ranking(found) == ""  # no stage leads yet
    monkeypatch.setattr("scripts.board.summary.LEADING_ROWS", 5)
    assert whole(rows, "pass") == [name for name in rows if name != "mamba2"]
    # The hybrid of ParaGRU is -0.093 ± 0.087 in pairs from the Transformer, ± 0.103 over all seeds, and +0.007 ± 0.100 from the best; GDN +0.100 ± 0.086, ± 0.093.
    assert ranking(found) == (
        "Equal tokens, 60M, 5 rows: GDN hybrid has the fewest bits per byte, 1.4100; not told apart from it, in pairs and over all seeds: ParaGRU hybrid. Against the "
        "Transformer (1.5100) not told apart: ParaGRU hybrid (-0.093); Gated DeltaNet (+0.000); ahead: GDN hybrid (-0.100); behind: ParaGRU (+0.100)."
    )


def test_the_whole_way_on_a_cpu(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, a wider grid where it is asked for, the full pass with everything read off, and the page; again, nothing is left to do."""
    monkeypatch.setitem(
        BOARDS,
        "tiny",
        BOARDS["tiny"].__class__(
            **{**vars(BOARDS["tiny"]), "tokens": 2560, "rates": (2e-3, 8e-3), "held_out_tokens": 500, "burst": 1, "contexts": (8,)}
        ),
    )
    monkeypatch.setattr("scripts.board.rates.MOST_RATES", 2)
    monkeypatch.setattr(measure, "BEYOND", 16)
    monkeypatch.setattr("scripts.board.work.READ0", 0)  # the only seed that there is
    words = [
        f"data={data}",
        f"out={tmp_path / 'out'}",
        f"page={tmp_path / 'page'}",
        "size=tiny",
        "rows=paragru",
        "stages=grid,speed,pass",
        "seeds=1",
        "device=cpu",
    ]
    assert program.main(["run", *words, "streams=2", "others=1"]) == 0
    assert "All cells known so far are finished" in capsys.readouterr().out
    names = sorted(path.stem.split(".")[0] for path in (tmp_path / "out" / "cells").iterdir())
    assert names == ["grid", "grid", "pass", "speed"]
    [path] = (tmp_path / "out" / "cells").glob("pass.*")
    cell = json.loads(path.read_text())
    assert (
        cell["beside"] == 3
        and cell["measured"]["position"]["buckets"][-1]["to"] == 16 * 32
        and cell["measured"]["memory"]["within"]["length"] == 32
    )
    lines = len((tmp_path / "out" / "attempts.jsonl").read_text().splitlines())
    assert program.main(["resume", *words]) == 0
    assert len((tmp_path / "out" / "attempts.jsonl").read_text().splitlines()) == lines == 8
    name = f"only={path.stem}"
    with pytest.raises(UserError, match="has no cell"):
        program.main(["again", *words, "only=pass.gdn@tiny.0.008.0"])
    capsys.readouterr()
    assert program.main(["again", *words, name, "stages=pass"]) == 0 and "the same bits" in capsys.readouterr().out
    write_json(path, cell | {"weights_sha256": "0"})
    assert program.main(["again", *words, name]) == 1 and "DIFFERENT: weights_sha256" in capsys.readouterr().out
    write_json(path, cell)
    page = tmp_path / "page"
    draw({"page": str(page), "out": str(tmp_path / "out"), "size": "tiny"})
    text = (page / "README.md").read_text()
    assert text.index("## Answers, nulls") < text.index("## Speed") and f"{cell['measured']['held_out']['bits_per_byte']:.4f}" in text
    # The page keeps all of it: drawn again without the folder it is the same, and nothing is left to do in another one.
    shutil.rmtree(tmp_path / "out")
    draw({"page": str(page), "out": str(tmp_path / "out"), "size": "tiny"})
    assert (page / "README.md").read_text() == text and len((page / "attempts.jsonl").read_text().splitlines()) == lines + 4
    assert program.main(["run", *words]) == 0
    assert not (tmp_path / "out" / "cells").exists()
    # Under a new version of the protocol the old cells are shown and do not count.
    monkeypatch.setattr("scripts.board.cells.PROTOCOL", 9)
    monkeypatch.setattr("scripts.board.draw.PROTOCOL", 9)
    draw({"page": str(page), "out": str(tmp_path / "out"), "size": "tiny"})
    detailed = (page / "details.md").read_text()
    assert "Under earlier versions" in detailed and "No cell of the grid is finished" in detailed


def test_the_page_of_a_whole_board(data: Path, tmp_path: Path) -> None:
    """Differences at equal tokens and equal time, a record that three seeds hold, and a board that mixes texts."""
    rows = ["gdn_hybrid", "gdn_hybrid_paragru"]
    plan = Plan("tiny", str(data), rows, speedrun=(2560, 0.01))
    known: dict[str, Result] = {}

    def loss(cell: Cell) -> float:
        if cell.stage == "grid":
            return abs(math.log(cell.settings["lr"] / 8e-3))
        return 1.4 + 0.01 * cell.settings["seed"] + {"time": -0.05, "speedrun": 0.0}.get(cell.stage, 0.02 * (cell.row == rows[1]))

    while cells := [c for c in plan.cells(known, ["grid", "speed", "pass", "time", "speedrun"]) if c.name not in known]:
        known |= results_of(cells, loss)
    for result in known.values():
        result.content.update(tokens=2560, seconds=4.0, mfu=None, peak_memory_bytes=None, curve=[])
    found = collect("tiny", list(known.values()), [])
    said = [a.text for a in all_answers(found["rows"]) if a.negative]
    assert any("at equal tokens: +0.0200 (+0.0200 to +0.0200, 5 seeds) bits per byte: worse" in text for text in said)
    assert any(
        "at equal time: +0.0700 (+0.0700 to +0.0700, 3 seeds) bits per byte; over all seeds, not in pairs, +0.0800" in text for text in said
    )
    for row, at in zip(rows, ((0.5, 0.5), (1.0, 0.4))):
        found["rows"][row]["probe"]["parity"] = {0: [{"length": 64, "accuracy": at[0]}, {"length": 256, "accuracy": at[1]}]}
    text, front = (" ".join(made.split()) for made in (details_text(found), page_text(found, [])))
    assert "Parity, of 2 rows: learnt by GDN hybrid, one ParaGRU (at four times the length too: none); not by GDN hybrid" in text
    assert "| 1.4200 ± 0.0196 | 5 |" in text and "5 and 3) | 0.0" in text
    first, comparisons = front.split("## Comparisons")
    assert "ParaGRU: worse in the GDN hybrid, 0.0256M tokens, +0.0200 (+0.0200 to +0.0200)" in first
    assert (
        "| GDN hybrid, one ParaGRU | 1.4400 ± 0.0196 (5) | " in first
        and "Parity by 1 of 2 rows, kept at four times the length by 0" in first
    )
    assert (
        "in GDN hybrid, at equal tokens | 0.0256M | +0.0200 (+0.0200 to +0.0200) | 0.000 | 5 | **worse, in pairs; not over all seeds** |"
        in comparisons
    )
    assert "4.0 s (mean of 3), GDN hybrid, 0.0M tokens, 1.4000, 1.4100, 1.4200" in comparisons
    assert "speedrun_tokens=2560 speedrun_lr=0.01" in comparisons
    # 30 seeds of ten rows less the six that are there, at 1e5 tokens/s all of them.
    assert (
        f"ten rows, 3 seeds | 24 | {24 * 25_600 / 1e5 / 3600:.2g} |" in comparisons
        and "leaders on 0.0512M tokens, 3 seeds | " in comparisons
    )
    # Where the speeds are others by now, cells of equal time have not the steps that they ask for.
    known[plan.speed("gdn_hybrid").name].content["tokens_per_s"] = 1.3e5
    other = collect("tiny", list(known.values()), [])
    assert found["outdated"] == 0 and other["outdated"] == 3 and "3 cells of equal time are left out" in details_text(other)
    assert not any("at equal time: +" in a.text for a in all_answers(other["rows"]))
    next(iter(known.values())).content["settings"]["data"]["held_out"] = ["another"]
    with pytest.raises(UserError, match="different held-out texts"):
        collect("tiny", list(known.values()), [])


def test_the_longer_run_stands_beside_the_same_seed_of_the_full_pass_and_small_differences_are_told_as_none(
    data: Path, tmp_path: Path
) -> None:
    rows = [*LEADERS]
    plan, known = Plan("tiny", str(data), rows, seeds=1), dict[str, Result]()
    while cells := [cell for row in rows for cell in plan.tried("grid", row, known) if cell.name not in known]:
        known |= results_of(cells, lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    found = collect("tiny", list(known.values()), [])
    assert (
        longer_answer(found) == "" and longer_table(found) == [] and "tokens\n" not in page_text(found, []).split("## Comparisons")[0][-40:]
    )
    first = {"paragru_hybrid": 1.164, "transformer": 1.19, "gdn_hybrid": 1.15, "gdn": 1.196}
    known |= results_of(plan.leaders(known), lambda cell: first[cell.row])
    passes = [_pass_of(plan, row, seed, known) for row in rows for seed in (0, 1)]
    known |= results_of(passes, lambda cell: 0.2 * cell.settings["seed"] + first[cell.row] + 0.01 * (cell.row == "gdn"))
    for name, result in known.items():
        position, gaps = {"collapse": {"verdict": "collapses (0.5 nat)"}}, [{"gap": gap, "copied": 0.6} for gap in (0, 16, 128)]
        measured = result.content["measured"] | {"position": position, "repeated": {"gaps": gaps}} if name.startswith("leaders") else {}
        known[name] = Result(
            name, result.content | {"tokens": 2560, "curve": [[1, 4.0], [10, 3.0]], **({"measured": measured} if measured else {})}
        )
    item = {"status": "done", "environment": {"device": "H"}, "model": {"precision": "bf16"}}
    for length in (1024, 512):
        passed: dict[str, object] = {"length": length, "accuracy": 512 / length, "low": 0.25, "high": 0.75, "n": 50, "cells": []}
        name = f"leaders.gdn_hybrid@tiny.0.008.1/items/passkey-{length}.json"
        write_json(tmp_path / "evals" / name, item | {"result": passed})
    found = collect("tiny", list(known.values()), []) | {"passkey": gather_passkey(tmp_path, tmp_path)}
    assert gather_passkey(tmp_path / "none", tmp_path) == found["passkey"]
    with_passkey(found["rows"], found["passkey"])
    said = longer_answer(found)
    assert (
        "0.0512M, 0.9 passes over the same text, one seed each and so no interval: GDN hybrid 1.1500 (-0.200); ParaGRU hybrid 1.1640 (-0.200)"
        in said
    )
    assert (
        "Gated DeltaNet +0.0060, too little for one seed to tell (after one pass +0.0160)" in said and "GDN hybrid -0.0400 (after" in said
    )
    table = "\n".join(longer_table(found))
    assert "| Gated DeltaNet | 1 | 0.008 | 1.1960 | 1.4060 | +0.0060 | +0.0160 | 3.500 | 3.500 |" in table
    assert "| GDN hybrid | collapses | 60 % | 60 % | 60 % |  | 100 (25 to 75), 50 (25 to 75) |" in table
    outcome = dict(expectations(found["rows"]))
    about = "Said of 350M tokens before their first cell (one seed each): "
    assert outcome[f"{about}the two hybrids within 0.01 of one another"] == ["GDN hybrid minus ParaGRU hybrid: did not hold, -0.0140"]
    assert outcome[f"{about}GDN within 0.015 of the Transformer"] == ["Gated DeltaNet minus Transformer: held, +0.0060"]
    assert "Gated DeltaNet collapses: did not hold" in outcome[f"{about}three with attention collapse past their length, GDN holds"]
    assert outcome[f"{about}passkey at 512 tokens found by none in more than a tenth"] == ["GDN hybrid 100 %: did not hold"]
    found["rows"]["gdn"]["leaders"]["0"] = {"bits_per_byte": 1.1, "diverged": False}
    assert "one seed of each (the others that are done are in the plot): GDN hybrid 1.1500" in longer_answer(found)
    del found["rows"]["gdn"]["leaders"]["0"]
    found["rows"]["transformer"]["pass"]["1"] |= {"bits_per_byte": None, "diverged": True}
    diverged = longer_table(found)  # nothing stands beside it, and nothing is taken from it
    assert "| Transformer | 1 | 0.008 | 1.1900 |  |  |  | 3.500 |  |" in "\n".join(diverged)
    assert "Gated DeltaNet +0.0060, too little for one seed to tell." in longer_answer(found)
    front = page_text(found, [])
    assert said.split(",")[0] in " ".join(front.split()) and "## 0.0512M tokens" in front


def _pass_of(plan: Plan, row: str, seed: int, known: dict[str, Result]) -> Cell:
    """A cell of the full pass."""
    lr = plan.best_rate("pass", row, known)
    assert lr is not None
    return plan.of_stage("pass", row, lr, seed)


def test_a_trained_cell_becomes_a_folder_with_its_numbers_in_the_card(data: Path, values: dict[str, Any]) -> None:
    cell = Plan("tiny", str(data), ["gdn_hybrid_dense_lstm"]).small("stage0", "gdn_hybrid_dense_lstm", {})[0][0]
    cell.settings.update(steps=4, held_out_tokens=500)
    result = run(cell, values | {"weights": True, "only": [cell.name]})
    assert result is not None
    with pytest.raises(UserError, match="only: did you mean 'stage0"):
        export_cells(values | {"only": [cell.name[:-1]]})
    cells = [{"depth": 0.5, "accuracy": 0.25, "n": 8, "low": 0.07, "high": 0.59, "prompt_tokens": 30}]
    chance = {"chance": 1e-5, "copies the beginning": 0.0, "copies the end": 0.0, "copies from anywhere": 0.0}
    found = {
        "task": "passkey",
        "length": 32,
        "cells": cells,
        "accuracy": 0.25,
        "n": 8,
        "low": 0.07,
        "high": 0.59,
        "without_reading": chance,
    }
    item = {"item": "passkey-32", "kind": "retrieval", "status": "done", "settings": {"task": "passkey"}, "result": found}
    items = Path(values["out"]) / "evals" / cell.name / "items"
    items.mkdir(parents=True)
    write_json(items / "passkey-32.json", item | {"key": "0", "seconds": 1.0, "model": {"name": cell.name}, "environment": {}})
    [folder] = export_cells(values)
    card = (folder / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and f"| {cell.name} | 25 (7-59) |" in card
    assert f"{result['measured']['held_out']['bits_per_byte']:.4f}" in card and result["weights_sha256"] in card
    assert f"again only={cell.name} size=tiny" in card and "1,024 in 4 steps" in card


def test_cells_side_by_side_are_measured_and_shown(data: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{key}={values[key]}" for key in ("data", "out", "page", "size", "device")]
    assert program.main(["beside", *words, "rows=paragru", "streams=2"]) == 0
    assert capsys.readouterr().out.startswith("paragru: tokens/s of so many cells together")
    [rates] = json.loads((Path(values["out"]) / "beside.json").read_text())["rows"].values()
    assert len(rates) == 2 and min(rates) > 0
    cells = results_of(Plan("tiny", str(data), ["paragru"]).tried("grid", "paragru", {}), lambda cell: 1.0)
    for result in cells.values():
        write_json(Path(values["out"]) / "cells" / f"{result.name}.json", result.content | {"tokens": 2560, "curve": []})
    draw(values)
    draw(values | {"out": "elsewhere"})  # the page keeps it
    assert f"| ParaGRU | {rates[0]:,.0f} (1.00) | {rates[1]:,.0f} (" in (Path(values["page"]) / "details.md").read_text()
