"""The board: equal models, cells that stop without a trace, a plan that follows from its results, and figures against sums written out."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.corpus import Corpus
from data.files import write_json
from data.shards import ShardSet
from evals.adapters.own import OwnAdapter
from models.lm import LanguageModel
from scripts.board import __main__ as program
from scripts.board import architectures, corpus, measure, results, work
from scripts.board.answers import Question, all_answers, answer
from scripts.board.draw import collect, draw
from scripts.board.expected import expectation_lines, expectations
from scripts.board.export import export_cells
from scripts.board.page import page_text
from scripts.board.plan import BOARDS, DECISIVE, DECISIVE_SEEDS, MORE_SEEDS, MOST_RATES, Plan
from scripts.board.queue import Queue
from scripts.board.results import Cell, Result, difference, interval
from training.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the tiny board: passages of the demo corpus."""
    folder = tmp_path_factory.mktemp("board")
    texts = [text[i : i + 30_000] for text in list(Corpus("demo", "text", False, 0, 0.01))[:12] for i in (0, 30_000)]
    texts += [texts[0] + texts[2]]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    random.Random(0).shuffle(texts)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert corpus.make(str(folder / "a.jsonl"), folder / "data", 512, 100_000) == 0
    return folder / "data"


@pytest.fixture
def values(data: Path, tmp_path: Path) -> dict[str, Any]:
    """What `run` hands to work, without a limit of time."""
    given = program.arguments(["run", f"data={data}", f"out={tmp_path / 'out'}", f"page={tmp_path / 'page'}", "size=tiny", "device=cpu"])[1]
    return given | {"until": 0.0, "environment": {}}


def run(cell: Cell, values: dict[str, Any], turns: float = math.inf) -> dict[str, Any] | None:
    """The cell's result, or None where it is left after so many turns, as by a kill."""
    training = work.train(cell, values, torch.device("cpu"))
    while turns > 0:
        try:
            next(training)
        except StopIteration as end:
            return end.value
        turns -= 1
    return None


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


@pytest.mark.parametrize("row", ["gdn_hybrid_paragru", "paragru_pass", "mamba2_muon"])
def test_a_killed_cell_goes_on_and_ends_in_the_same_bits(row: str, data: Path, values: dict[str, Any], tmp_path: Path) -> None:
    cell = Plan("tiny", str(data), [row]).grid(row, {})[1]
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
    # With time for a speed cell but not for what a cell of this row took, the former is taken; it shares its device with nobody.
    done = results_of(Plan("tiny", str(data), values["rows"], values["precision"]).stage0("paragru", {})[0][:1], lambda cell: 2.0)
    for name, result in done.items():
        write_json(Path(values["out"]) / "cells" / f"{name}.json", result.content | {"took": 1000.0})
    late = Queue(values | {"until": time.time() + 100}, "cuda0")
    first = late.take()
    assert first is not None and first.stage == "speed" and late.take() is None
    [another] = [cell for cell in Plan("tiny", str(data), values["rows"]).cells({}, ["speed"]) if cell.name != first.name]
    assert not Queue(values, "cuda0")._lock(another) and Queue(values, "cuda2")._lock(another)


@pytest.mark.parametrize("task", ["mqar", "S3"])
def test_a_probe_is_trained_and_scored_at_several_lengths(task: str, data: Path, values: dict[str, Any]) -> None:
    cell = Plan("tiny", str(data), ["dense_lstm"]).probe("dense_lstm", task, 0)
    cell.settings.update(steps=2, rows=8, lengths=[64, 128])
    result = run(cell, values)
    assert result is not None and [row["length"] for row in result["measured"]["lengths"]] == [64, 128]
    assert all(0 <= row["accuracy"] <= 1 for row in result["measured"]["lengths"])


def test_stages_0_and_1_go_from_rates_to_seeds_to_equal_time_group_after_group(data: Path) -> None:
    rows = ["gdn_hybrid", "gdn_hybrid_paragru", "transformer"]
    plan = Plan("tiny", str(data), rows)
    known = results_of([plan.speed(row) for row in rows], lambda cell: 1.0)
    known[plan.speed("gdn_hybrid").name].content["tokens_per_s"] = 1.5e5
    stages = ["stage0", "time0", "stage1", "time1"]

    def loss(cell: Cell) -> float:
        return (
            math.inf
            if cell.stage == "stage0" and cell.row == "transformer" and cell.settings["seed"] == 2
            else abs(math.log(cell.settings["lr"] / 8e-3))
        )

    waves = []
    while cells := [c for c in plan.cells(known, stages) if c.name not in known]:
        waves.append([cell.name for cell in cells])
        known |= results_of(cells, loss)
    assert [name.split(".")[1] for name in waves[0]] == [f"{row}@tiny" for row in rows[:2] * 3 + ["transformer"] * 3]
    seeds = (1, 1, 2, 2, 3, 3, 4, 4)
    assert waves[1][:10] == [f"stage0.{row}@tiny.0.008.{s}" for s, row in zip(seeds, rows[:2] * 4)] + [
        f"stage0.transformer@tiny.0.008.{s}" for s in (1, 2)
    ]
    assert waves[1][10:20] == [f"stage1.{row}@tiny.0.008.{s}" for s, row in zip((0, 0, *seeds), rows[:2] * 5)]
    time0 = [f"time0_of_gdn_hybrid_paragru.gdn_hybrid@tiny.0.008.{seed}" for seed in range(5)]
    more = [f"stage1.{row}@tiny.0.008.{seed}" for seed in range(5, MORE_SEEDS) for row in rows[:2]]
    time1 = [f"time1.gdn_hybrid_paragru@tiny.0.008.{seed}" for seed in range(5)]
    assert waves[1][20:] == [f"stage1.transformer@tiny.0.008.{s}" for s in range(3)] + time0 + more + time1
    half = [f"{stage}.transformer@tiny.0.004.{seed}" for stage in ("stage0", "stage1") for seed in range(3)]
    assert waves[2:] == [half]  # diverged in a seed: at half the rate
    assert known[time0[0]].content["settings"]["steps"] == int(1.5 * 2560) // 256
    assert known[time1[0]].content["settings"]["steps"] == int(0.67 * (10_100 - 32)) // 256
    assert {work.reads_all(cell) for cell in plan.cells(known, stages) if cell.settings["seed"] != 1} == {False}
    for result in known.values():
        result.content.update(tokens=2560, seconds=4.0, curve=[])
    found = collect("tiny", list(known.values()), [])
    assert {cell["lr"] for stage in ("stage0", "stage1") for cell in found["rows"]["transformer"][stage].values()} == {4e-3}
    assert len(found["rows"]["gdn_hybrid"]["stage1"]) == MORE_SEEDS and len(found["rows"]["gdn_hybrid_paragru"]["time1"]) == 5
    assert sorted(found["rows"]["gdn_hybrid"]["stage0"]) == ["0", "1", "2", "3", "4"]
    text = page_text(found, [])
    assert "Stage 0: One layer of ParaGRU in Gated DeltaNet 3:1 attention, at equal tokens: +0.0000" in text and "without seed 0" in text
    assert "Stage 1: One layer of ParaGRU in Gated DeltaNet 3:1 attention, at equal time: +0.0000" in text
    assert "No cell of the full pass is finished" in text and "| stage 0, 0.00256M tokens, 3 seeds or more | 2 of" in text


def test_a_trained_cell_becomes_a_folder_with_its_numbers_in_the_card(data: Path, values: dict[str, Any]) -> None:
    cell = Plan("tiny", str(data), ["gdn_hybrid_dense_lstm"]).stage0("gdn_hybrid_dense_lstm", {})[0][0]
    cell.settings.update(steps=4, held_out_tokens=500)
    result = run(cell, values | {"weights": True, "only": [cell.name]})
    assert result is not None
    with pytest.raises(UserError, match="only: did you mean 'stage0"):
        export_cells(values | {"only": [cell.name[:-1]]})
    [folder] = export_cells(values)
    card = (folder / "README.md").read_text()
    assert f"{result['measured']['held_out']['bits_per_byte']:.4f}" in card and result["weights_sha256"] in card
    assert f"again only={cell.name} size=tiny" in card and "1,024 in 4 steps" in card


def test_training_is_strict_and_a_model_without_an_order_says_so(
    data: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch cannot sum in order raises while a cell trains; that step is then taken all the same, once, and the result tells."""
    from scripts.board.learner import Learner

    cell = Plan("tiny", str(data), ["paragru"]).grid("paragru", {})[0]
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
        cell = Plan("tiny", str(data), [row], "bf16").grid(row, {})[1]
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


def test_time_that_is_up_saves_the_cell_and_other_settings_begin_anew(data: Path, values: dict[str, Any]) -> None:
    plan = Plan("tiny", str(data), ["paragru"])
    cell = plan.grid("paragru", {})[0]
    with pytest.raises(work.Stopped, match="after step 1 of 20"):
        run(cell, values | {"until": 1.0})
    [under_way] = (Path(values["out"]) / "under_way").iterdir()
    assert under_way.stem == cell.name
    from scripts.board.learner import Learner

    assert Learner(cell.settings, str(data), torch.device("cpu")).load(under_way) is not None
    assert Learner(cell.settings | {"lr": 1.0}, str(data), torch.device("cpu")).load(under_way) is None


def test_a_pass_reads_every_window_once_and_equal_seeds_read_the_same(data: Path) -> None:
    from scripts.board.learner import Learner

    plan = Plan("tiny", str(data), ["gdn", "paragru"])
    read = []
    for row in ("gdn", "paragru"):
        cell = plan.grid(row, {})[0]
        learner = Learner(cell.settings | {"steps": 1}, str(data), torch.device("cpu"))
        a_pass = [learner._offsets(n) for n in range(2 * learner.windows // learner.B)]
        read.append(np.concatenate(a_pass))
    assert np.array_equal(read[0], read[1])
    first = read[0][: learner.windows]
    assert sorted(first) == list(range(0, learner.windows * 32, 32)) and first.max() + 33 <= cell.settings["span"]
    second = read[0][learner.windows :]
    assert set(second) <= set(first) and not np.array_equal(second, first[: len(second)])


def test_held_out_bits_are_those_of_documents_read_one_window_at_a_time(data: Path) -> None:
    shards = ShardSet(data, "valid")
    model = LanguageModel(architectures.model_config("gdn", "tiny", 512))
    model.init_weights(0)
    found = measure.held_out(model, shards, 100, "fp32", batch=7)
    nats, tokens, size = 0.0, 0, 0
    for i in range(shards.n_documents):
        ids, n_bytes = shards.document(i)
        size += n_bytes
        for a in range(0, len(ids) - 1, 100):
            piece = torch.from_numpy(ids[a : a + 101].astype(np.int64))[None]
            with torch.no_grad():
                logits = model(piece[:, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(logits[0].double(), piece[0, 1:], reduction="sum"))
            tokens += piece.shape[1] - 1
    assert found["tokens"] == tokens and found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_a_repeated_passage_is_scored_at_its_second_reading(data: Path) -> None:
    """A model that says the token n places back with certainty, n the passage and the gap, saves all of the loss there."""
    shards = ShardSet(data, "valid")

    class Copier(OwnAdapter):
        vocab_size, device = 512, torch.device("cpu")

        def __init__(self) -> None:
            pass

        def stream(self, ids_BT: torch.Tensor, chunk: int, each: Callable[..., None], batch_state: Any = None) -> None:
            labels = ids_BT[:, 1:]
            nll = torch.full(labels.shape, 6.0)
            for period in (8, 8 + 16, 8 + 128):
                again = labels[:, period:] == labels[:, :-period]
                if bool(again[:, -8:].all()) and labels.shape[1] == period + 8:
                    nll[:, period:] = torch.where(again, 0.0, 6.0)
            each(0, nll, None)

    found = measure.repeated(Copier(), shards, 32, 4)
    assert [gap["gap"] for gap in found["gaps"]] == [0, 16, 128]
    assert all(gap["first"] == 6.0 and gap["again"] == 0.0 and gap["copied"] == 1.0 for gap in found["gaps"])


def test_the_corpus_follows_from_its_documents_not_from_their_order(data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert corpus.make(str(data.parent / "b.jsonl"), again, 512, 100_000) == 0
    assert corpus.identity(again) == corpus.identity(data)
    corpus.part(data, tmp_path / "small")
    assert corpus.identity(tmp_path / "small", 60_000) == corpus.identity(data, 60_000) != corpus.identity(data)
    with pytest.raises(UserError, match="holds 10.,..."):
        corpus.identity(tmp_path / "small", 150_000)
    parts = corpus.split(data, tmp_path / "part", 260_000)
    assert len(parts) > 1 and all(sum(f.stat().st_size for f in p.iterdir()) <= 260_000 for p in parts)
    corpus.join(parts, tmp_path / "joined")
    assert corpus.identity(tmp_path / "joined") == corpus.identity(data)


def results_of(cells: list[Cell], loss: Callable[[Cell], float]) -> dict[str, Result]:
    """Results of cells as if they had these bits per byte; diverged where that is infinite."""
    made = {}
    for cell in cells:
        bits = loss(cell)
        content = {"settings": json.loads(json.dumps(cell.settings)), "stage": cell.stage, "row": cell.row, "name": cell.name}
        content |= {
            "ended": "tokens" if math.isfinite(bits) else "diverged",
            "measured": {"held_out": {"bits_per_byte": bits}},
            "tokens_per_s": 1e5,
        }
        made[cell.name] = Result(cell.name, content)
    return made


def test_the_grid_widens_where_its_best_is_at_the_edge_and_decides_the_pass(data: Path) -> None:
    plan = Plan("tiny", str(data), ["gdn"])
    rates = list(BOARDS["tiny"].rates)

    def rates_after(loss: Callable[[Cell], float]) -> list[float]:
        known: dict[str, Result] = {}
        while True:
            cells = plan.grid("gdn", known)
            if all(cell.name in known for cell in cells):
                assert (plan.rate("gdn", known) or 0) == min(cells, key=loss).settings["lr"]
                return [cell.settings["lr"] for cell in cells]
            assert plan.rate("gdn", known) is None and plan.passes("gdn", known) == []
            known |= results_of(cells, loss)

    assert rates_after(lambda cell: abs(math.log(cell.settings["lr"] / rates[1]))) == rates
    assert rates_after(lambda cell: abs(math.log(cell.settings["lr"] / rates[2]))) == pytest.approx([*rates, 4 * rates[2]])
    assert rates_after(lambda cell: math.inf if cell.settings["lr"] > 1e-3 else 3 - cell.settings["lr"])[0] == pytest.approx(rates[0] / 16)
    assert len(rates_after(lambda cell: cell.settings["lr"])) == MOST_RATES


def test_a_row_that_diverged_is_run_again_at_half_its_rate_and_then_stays(data: Path) -> None:
    plan = Plan("tiny", str(data), [*DECISIVE, "gdn"])
    known = results_of(plan.grid("gdn", {}), lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    cells = plan.passes("gdn", known)
    assert [cell.settings["lr"] for cell in cells] == [8e-3] * 3
    known |= results_of(cells, lambda cell: math.inf if cell.settings["seed"] == 2 else 1.0)
    halved = plan.passes("gdn", known)
    assert [cell.settings["lr"] for cell in halved] == [4e-3] * 3
    known |= results_of(halved, lambda cell: math.inf)
    assert [cell.settings["lr"] for cell in plan.passes("gdn", known)] == [4e-3] * 3
    known |= results_of(plan.grid("gdn_hybrid_paragru", {}), lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    known |= results_of(plan.grid("gdn_hybrid", {}), lambda cell: abs(math.log(cell.settings["lr"] / 8e-3)))
    assert len(plan.passes("gdn_hybrid_paragru", known)) == DECISIVE_SEEDS
    known |= results_of([plan.speed(row) for row in ("gdn_hybrid", "gdn_hybrid_paragru")], lambda cell: 1.0)
    known[plan.speed("gdn_hybrid").name].content["tokens_per_s"] = 1.5e5
    times = plan.equal_time("gdn_hybrid_paragru", known)
    assert [cell.row for cell in times] == ["gdn_hybrid"] * 3 and times[0].settings["steps"] == int(1.5 * 25_600) // 256


def test_intervals_are_students(data: Path) -> None:
    found = interval([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(4.302653 * 1.527525 / math.sqrt(3), rel=1e-5)
    apart = difference({0: 1.0, 1: 2.0, 3: 9.0}, {0: 0.5, 1: 1.6, 2: 7.0})
    assert apart is not None and apart.n == 2 and apart.mean == pytest.approx(0.45) and not apart.decides()
    one = interval([3.0])
    assert one is not None and one.half == math.inf and not one.decides() and interval([]) is None


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
    assert "-0.1000" in better.text and better.text.endswith("better.") and not better.negative
    against = answer(rows, Question("M", "mamba2", "gdn", -1))
    assert against.negative and "against what was expected" in against.text
    null = answer(rows, Question("H", "gdn_hybrid", "gdn", 0))
    assert null.negative and "no difference is shown; the interval is wider than 0.01" in null.text
    assert not answer(rows, Question("P", "paragru", "gdn", 0)).known
    said = dict(expectations(rows))
    [order_of_three] = said["Gated DeltaNet is ahead of Mamba-2, Mamba-2 of ParaLSTM and ParaGRU"]
    assert order_of_three == "GDN minus Mamba-2: held, -0.1000 (-0.1000 to -0.1000, 3 seeds)"
    hybrids = said["Hybrids are ahead of their recurrent rows, and of the Transformer, by 0.01 to 0.03"]
    assert (
        hybrids[0].startswith("Gated DeltaNet 3:1 attention minus Gated DeltaNet: open")
        and not said["State passing costs nothing within the interval"]
    )
    assert any(line.endswith("| not answered yet |") for line in expectation_lines(rows))
    order = [(a.known, a.negative) for a in all_answers(rows)]
    assert order == sorted(order, key=lambda pair: (not pair[0], not pair[1])) and (True, True) in order and (True, False) in order


def test_the_whole_way_on_a_cpu(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Grid, a wider grid where it is asked for, the full pass with everything read off, and the page; again, nothing is left to do."""
    monkeypatch.setitem(
        BOARDS,
        "tiny",
        BOARDS["tiny"].__class__(
            **{**vars(BOARDS["tiny"]), "tokens": 2560, "rates": (2e-3, 8e-3), "held_out_tokens": 500, "burst": 1, "contexts": (8,)}
        ),
    )
    monkeypatch.setattr("scripts.board.plan.MOST_RATES", 2)
    monkeypatch.setattr(measure, "BEYOND", 16)
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
    assert program.main(["run", *words, "streams=2"]) == 0
    assert "All cells known so far are finished" in capsys.readouterr().out
    names = sorted(path.stem.split(".")[0] for path in (tmp_path / "out" / "cells").iterdir())
    assert names == ["grid", "grid", "pass", "speed"]
    [path] = (tmp_path / "out" / "cells").glob("pass.*")
    cell = json.loads(path.read_text())
    assert cell["measured"]["position"]["buckets"][-1]["to"] == 16 * 32 and cell["measured"]["memory"]["within"]["length"] == 32
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
    assert text.index("Nulls and negative") < text.index("## Loss") and f"{cell['measured']['held_out']['bits_per_byte']:.4f}" in text
    # The page keeps all of it: drawn again without the folder it is the same, and nothing is left to do in another one.
    shutil.rmtree(tmp_path / "out")
    draw({"page": str(page), "out": str(tmp_path / "out"), "size": "tiny"})
    assert (page / "README.md").read_text() == text and len((page / "attempts.jsonl").read_text().splitlines()) == lines + 4
    assert program.main(["run", *words]) == 0
    assert not (tmp_path / "out" / "cells").exists()
    # Under a new version of the protocol the old cells are shown and do not count.
    monkeypatch.setattr("scripts.board.plan.PROTOCOL", 9)
    monkeypatch.setattr("scripts.board.draw.PROTOCOL", 9)
    draw({"page": str(page), "out": str(tmp_path / "out"), "size": "tiny"})
    assert (
        "Under earlier versions" in (page / "README.md").read_text()
        and "No cell of the grid is finished" in (page / "README.md").read_text()
    )


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
    assert any("at equal time: +0.0700 (+0.0700 to +0.0700, 3 seeds) bits per byte: worse" in text for text in said)
    text = page_text(found, [])
    assert (
        "| 1.4200 ± 0.0196 | 5 |" in text and "4.0 s (mean of 3), Gated DeltaNet 3:1 attention, 0.0M tokens, 1.4000, 1.4100, 1.4200" in text
    )
    assert "speedrun_tokens=2560 speedrun_lr=0.01" in text
    next(iter(known.values())).content["settings"]["data"]["held_out"] = ["another"]
    with pytest.raises(UserError, match="different held-out texts"):
        collect("tiny", list(known.values()), [])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["rum"], "Say first what is to be done"),
        (["run", "rows=gnd"], "rows: did you mean 'gdn'"),
        (["run", "stages=grit"], "stages: did you mean 'grid'"),
        (["run", "stages=speedrun"], "A speedrun needs speedrun_tokens"),
        (["run", "minutes=-1"], "minutes must be zero or more"),
        (["plan", "size=7b"], "size is '7b'; choose one of"),
    ],
)
def test_mistakes_are_sentences(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        program.arguments(words)
