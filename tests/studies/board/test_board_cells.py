"""A cell of the board: stopped without a trace, strict, the same bits again, each window read once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.board import results, work
from scripts.board.plan import Plan
from tests.studies.board.made import run
from training.errors import UserError


@pytest.mark.parametrize("row", ["gdn_hybrid_paragru", "paragru_pass", "mamba2_muon"])
def test_a_killed_cell_goes_on_and_ends_in_the_same_bits(row: str, data: Path, values: dict[str, Any], tmp_path: Path) -> None:
    cell = Plan("tiny", str(data), [row]).tried("grid", row, {})[1]
    cell.settings.update(steps=14, held_out_tokens=500)
    whole = run(cell, values)
    assert whole is not None and whole["steps"] == cell.settings["steps"] and whole["ended"] == "tokens"
    other = values | {"out": str(tmp_path / "other"), "save_every": 1e-9}
    assert run(cell, other, 1) is None  # nothing is saved by being left
    assert run(cell, other, 1) is None
    stopped = run(cell, other)
    assert stopped is not None and stopped["stops"] == 2
    for key in ("weights_sha256", "curve", "measured"):
        assert stopped[key] == whole[key], key
    events = [line["event"] for line in results.attempts(Path(other["out"]))]
    assert events == ["begun", "resumed", "resumed"]
    assert not list((tmp_path / "other" / "under_way").iterdir())


def test_time_that_is_up_saves_the_cell_and_other_settings_begin_anew(data: Path, values: dict[str, Any]) -> None:
    plan = Plan("tiny", str(data), ["paragru"])
    cell = plan.tried("grid", "paragru", {})[0]
    with pytest.raises(work.Stopped, match="after step 1 of 20"):
        run(cell, values | {"until": 1.0})
    [under_way] = (Path(values["out"]) / "under_way").iterdir()
    assert under_way.stem == cell.name
    from scripts.board.learner import Learner

    assert Learner(cell.settings, str(data), torch.device("cpu")).load(under_way) is not None
    assert Learner(cell.settings | {"lr": 1.0}, str(data), torch.device("cpu")).load(under_way) is None
    under_way.write_bytes(under_way.read_bytes()[:5000])
    with pytest.raises(ValueError, match="is cut off or no saved cell; delete it"):
        Learner(cell.settings, str(data), torch.device("cpu")).load(under_way)


def test_files_that_were_cut_off_are_run_again_or_named(tmp_path: Path) -> None:
    """A result that is none is run again; a line of a kept file that is cut off would take results out of the page, and is named."""
    out, page = tmp_path / "out", tmp_path / "page"
    (out / "cells").mkdir(parents=True)
    page.mkdir()
    for name, text in (("a", "{}"), ("b", "[1]"), ("c", '{"name": "x", "settings": []}'), ("d", '{"name": "x", "sett'), ("e", "null")):
        (out / "cells" / f"{name}.json").write_text(text)
    assert results.read(out, page) == {} and results.gather(out, page) == []
    whole = json.dumps({"name": "x", "settings": {"protocol": 3}, "at": "1"})
    for name in ("cells.jsonl", "attempts.jsonl", "again.jsonl"):
        (page / name).write_text(f"{whole}\n{whole[:9]}\n")
    for call in (lambda: results.read(out, page), lambda: results.attempts(page), lambda: results.gather_again(out, page, [])):
        with pytest.raises(UserError, match="Line 2 of .* is cut off or no JSON"):
            call()


def test_a_cell_that_failed_ends_a_run_with_1_and_is_tried_again(
    data: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.board import __main__ as program

    plan = Plan("tiny", str(data), ["paragru"])
    cell = plan.tried("grid", "paragru", {})[0]
    words = [f"{key}={values[key]}" for key in ("data", "out", "page", "size", "device")] + [
        "stages=grid",
        "rows=paragru",
        f"only={cell.name}",
    ]
    under_way = Path(values["out"]) / "under_way" / f"{cell.name}.safetensors"
    under_way.parent.mkdir(parents=True)
    under_way.write_bytes(b"none")
    assert program.main(["run", *words]) == 1
    said = capsys.readouterr().out
    assert "delete it, and the cell begins anew." in said and f"Failed: {cell.name}; " in said
    under_way.unlink()
    monkeypatch.setattr("scripts.board.work._measured", lambda *given: {"held_out": {"bits_per_byte": 1.0}})
    assert program.main(["run", *words]) == 0 and "All cells known so far are finished" in capsys.readouterr().out


def test_training_is_strict_and_a_model_without_an_order_says_so(
    data: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch cannot sum in order raises while a cell trains; that step is then taken all the same, once, and the result tells."""
    from scripts.board.learner import Learner

    cell = Plan("tiny", str(data), ["paragru"]).tried("grid", "paragru", {})[0]
    cell.settings.update(steps=3, held_out_tokens=500)
    taken, strict = Learner._taken, []

    def refuses(self: Learner, *places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        strict.append(torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled())
        if strict[-1]:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")
        return taken(self, *places)

    monkeypatch.setattr(Learner, "_taken", refuses)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        result = run(cell, values)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert strict == [True, False, False, False]
    assert result is not None and result["unordered"].startswith("cumsum_cuda_kernel") and result["steps"] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("row", ["transformer", "gdn_hybrid_dense_lstm", "transformer_muon"])
def test_a_cell_repeats_on_a_gpu(row: str, data: Path, values: dict[str, Any]) -> None:
    """Twice the same weights, the second time stopped and gone on with; attention's backward pass is the one that did not repeat."""
    from scripts.board.repeat import repeatable

    device = repeatable(0, "cuda")
    try:
        cell = Plan("tiny", str(data), [row], "bf16").tried("grid", row, {})[1]
        cell.settings.update(steps=40, rows=64, held_out_tokens=500)
        path = Path(values["out"]) / "cells" / f"{cell.name}.json"
        for _ in work.train(cell, values, device):
            pass
        first = json.loads(path.read_text())
        training = work.train(cell, values | {"save_every": 1e-9}, device)
        next(training)
        training.close()
        for _ in work.train(cell, values, device):
            pass
        second = json.loads(path.read_text())
        assert second["stops"] == 1 and not second["unordered"]
        assert [second[key] for key in ("weights_sha256", "curve")] == [first[key] for key in ("weights_sha256", "curve")]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("task", ["mqar", "S3"])
def test_a_probe_is_trained_and_scored_at_several_lengths(task: str, data: Path, values: dict[str, Any]) -> None:
    cell = Plan("tiny", str(data), ["dense_lstm"]).probe("dense_lstm", task, 0)
    cell.settings.update(steps=2, rows=8, lengths=[64, 128])
    result = run(cell, values)
    assert result is not None and [row["length"] for row in result["measured"]["lengths"]] == [64, 128]
    assert all(0 <= row["accuracy"] <= 1 for row in result["measured"]["lengths"])


def test_a_pass_reads_every_window_once_and_equal_seeds_read_the_same(data: Path) -> None:
    from scripts.board.learner import Learner

    plan = Plan("tiny", str(data), ["gdn", "paragru"])
    read = []
    for row in ("gdn", "paragru"):
        cell = plan.tried("grid", row, {})[0]
        learner = Learner(cell.settings | {"steps": 1}, str(data), torch.device("cpu"))
        a_pass = [learner._offsets(n) for n in range(2 * learner.windows // learner.B)]
        read.append(np.concatenate(a_pass))
    assert np.array_equal(read[0], read[1])
    first = read[0][: learner.windows]
    assert sorted(first) == list(range(0, learner.windows * 32, 32)) and first.max() + 33 <= cell.settings["span"]
    second = read[0][learner.windows :]
    assert set(second) <= set(first) and not np.array_equal(second, first[: len(second)])


def test_compiling_takes_the_steps_and_readings_of_a_cell_and_leaves_nothing(
    data: Path, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts.board import compiling, measure
    from scripts.board.learner import Learner

    taken: list[tuple[int, int, int]] = []
    read: list[dict[str, Any]] = []
    advance, everything = Learner.advance, measure.everything

    def steps(learner: Learner, until: int) -> Iterator[int]:
        taken.append((learner.B, learner.T, until))
        yield from advance(learner, until)

    def reading(model: Any, shards: str, settings: dict[str, Any], full: bool) -> None:
        read.append(everything(model, shards, settings, full))

    monkeypatch.setattr(measure, "BEYOND", 16)
    monkeypatch.setattr(Learner, "advance", steps)
    monkeypatch.setattr(measure, "everything", reading)
    before = sorted(tmp_path.rglob("*"))
    assert compiling.compile_row("paragru", values) > 0
    assert taken == [(8, 32, compiling.STEPS)] and sorted(tmp_path.rglob("*")) == before
    assert set(read[0]) == {"held_out", "position", "repeated", "memory"} and not any("failed" in part for part in read[0].values())

    class Failing:
        exitcode = 1

        def __init__(self, target: Any, args: tuple[str, dict[str, Any], int]) -> None:
            assert target is compiling.compile_row and args[2] == ["paragru", "gdn"].index(args[0])

        def start(self) -> None: ...

        def join(self) -> None: ...

    monkeypatch.setattr(compiling.multiprocessing, "get_context", lambda name: type("Context", (), {"Process": Failing}))
    with pytest.raises(UserError, match="rows=paragru"):
        compiling.compile_all(values | {"rows": ["paragru", "gdn"]})
