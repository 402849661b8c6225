"""Composed maps chosen by a layer's plan (kernels/dense_rnn/maps.py): when they are tried, that they solve as the walk in order does, and that what
was learnt goes on with a run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.dense_rnn import automata, dense_rnn, dictionary, plans, reference
from kernels.dense_rnn.plans import PERIOD, Plans
from models.cells import load_cell
from scripts.bench.trackers import TRACKERS, size, tracker
from tests.kernels.dense_rnn_cases import problem
from tests.kernels.maps_cases import Walked, failed


@pytest.fixture(autouse=True)
def short_rows_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a hundred steps, as those of ten thousands would."""
    monkeypatch.setattr(dictionary, "OVERHEAD", 0)
    monkeypatch.setattr(dictionary, "SHORTEST", 12)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_layer_that_corrections_fail_is_solved_by_maps(name: str) -> None:
    cell, K = load_cell("dense_elman"), size(name)[0]
    run = Walked(cell, 1)
    states = []
    for step in range(4):
        given = tracker(name, cell, 1, 256, 1, torch.float32, seed=step)
        got = dense_rnn(cell, *given, learner=run.layer.number)[0]
        assert torch.equal(got, reference.sequential(cell, *given, None)[0][:, :, -1]), step
        states.append((run.maps.status, automata.last_report.slices))
        run.decide()
    assert [status for status, _ in states] == ["off", "off", "looking", "tried"] and run.maps.status == "on"
    assert states[-1][1] > 1 and not automata.last_report.walked and automata.last_report.repeats == 0
    assert run.maps.dictionary is not None and run.maps.dictionary.shape[1] >= K * (name != "A5")


def solved(run: Walked, tensors: list[Tensor]) -> None:
    dense_rnn(run.cell, *tensors, learner=run.layer.number)


def test_what_is_no_automaton_is_never_sent_there_twice() -> None:
    cell, tensors, _ = problem("dense_gru", 1, 256, 1, 16, gain=4.0)
    given = [t.float() for t in tensors]
    run = Walked(cell, 1)
    seen = []
    for _ in range(4):
        solved(run, given)
        run.decide()
        seen.append(run.maps.status)
    assert set(seen) == {"off", "looking"} and run.maps.failed < 0  # its states lie nowhere near a few: it was looked at, and not sent
    run.maps.failed = plans.STALE  # one that looks like an automaton and is none
    run.maps.dictionary, run.maps.status = torch.zeros(1, 8, 1, 16), "tried"
    for _ in range(1):
        solved(run, given)
        run.decide()
    assert run.maps.status == "refused" and automata.last_report.walked
    for _ in range(3):
        solved(run, given)
        run.decide()
    assert run.maps.status == "refused" and run.maps.in_force(given[0], given[2], 1) is None


def test_corrections_that_suffice_and_short_rows_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = load_cell("dense_elman")
    given = tracker("S3", cell, 1, 256, 1, torch.float32)
    run = Walked(cell, 1, failing=False)
    for _ in range(4):
        run.maps.in_force(given[0], given[2], 1)
        run.decide()
    assert run.maps.status == "off" and run.maps.failed == 0
    monkeypatch.setattr(dictionary, "OVERHEAD", 400)
    failed(run.layer)
    for _ in range(4):
        run.maps.in_force(given[0], given[2], 1)
        run.decide()
    assert run.maps.status == "off" and run.maps.failed > 0


def test_ranks_hold_one_dictionary_and_a_run_that_was_cut_goes_on_bit_for_bit() -> None:
    cell = load_cell("dense_gru")
    one, other = Walked(cell, 1), Walked(cell, 1)
    heard: list[list[float]] = []

    def tells(values: list[float]) -> list[float]:
        heard.append(values)
        return values

    def step(seed: int) -> tuple[Tensor, Tensor]:
        """One step of two ranks that read other words."""
        out = []
        for rank, run in enumerate((one, other)):
            given = tracker("S3", cell, 1, 256, 1, torch.float32, seed=2 * seed + rank)
            out.append(dense_rnn(cell, *given, learner=run.layer.number)[0])
        words = [a + b for a, b in zip(one.words(), other.words())]
        one.plans.decide(words, 2, tells)
        other.plans.decide(words, 2, lambda values: heard.pop(0))
        return out[0], out[1]

    for run in (one, other):
        run.maps.failed = 1
        run.plans.steps = PERIOD - 1
    step(0)  # a choice: both begin to look
    one.plans.steps = other.plans.steps = PERIOD - 1
    step(1)
    assert one.maps.status == other.maps.status == "tried"
    assert one.maps.dictionary is not None and other.maps.dictionary is not None and torch.equal(one.maps.dictionary, other.maps.dictionary)
    again = [Plans(1, torch.device("cpu")) for _ in range(2)]
    for copy, run in zip(again, (one, other)):
        copy.load(json.loads(json.dumps(run.plans.state())))
        assert copy.state() == run.plans.state()
    whole = [step(seed) for seed in range(2, 4)]
    for copy, run in zip(again, (one, other)):
        run.plans = copy
    cut = [step(seed) for seed in range(2, 4)]
    assert all(torch.equal(a, b) for pair, twin in zip(whole, cut) for a, b in zip(pair, twin))
    assert automata.last_report.slices > 1 and not automata.last_report.walked


def test_ranks_of_unlike_devices_choose_alike() -> None:
    """The second rank's device fills with a hundredth of the rows, so that it would not look for candidates: it goes by the first one's."""
    one, other = (Walked(load_cell("dense_elman"), 1) for _ in range(2))
    heard: list[list[float]] = []

    def tells(values: list[float]) -> list[float]:
        heard.append(values)
        return values

    seen = []
    for _ in range(4):
        for run in (one, other):
            run.maps.shape = (1, 256, 1, 1, 12)  # as solves say
            run.maps.met = torch.eye(12)[torch.arange(64) % 6, None]
            run.plans.steps = PERIOD - 1
        other.maps.programs, other.layer.passes[0].reckoned = 1, 1
        words = [a + b for a, b in zip(one.words(), other.words())]
        changed = one.plans.decide(words, 2, tells), other.plans.decide(words, 2, lambda values: heard.pop(0))
        assert changed[0] == changed[1] and one.plans.state() == other.plans.state() and not heard
        seen.append(other.maps.status)
    assert seen == ["off", "looking", "tried", "on"] and other.maps.slices(8) == one.maps.slices(8) > 1


def test_plans_of_before_are_read() -> None:
    run = Walked(load_cell("dense_gru"), 1)
    state = run.plans.state()
    del state["maps"]
    run.plans.load(state)
    assert run.maps.status == "off"


def test_a_pass_that_is_made_again_for_its_gradients_solves_alike() -> None:
    cell = load_cell("dense_gru")
    run = Walked(cell, 1)
    run.maps.status = "looking"
    dense_rnn(cell, *tracker("parity", cell, 1, 256, 1, torch.float32, seed=1), learner=run.layer.number)
    run.decide()
    assert run.maps.status == "tried"
    pre, rec, mat, h0 = tracker("parity", cell, 1, 256, 1, torch.float32)
    pre = 0.02 * pre  # not saturated, so that there are gradients

    def gradients(learner: int, again: bool) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in (pre, rec, mat * 0.02, h0)]

        def solve(*tensors: Tensor) -> Tensor:
            return dense_rnn(cell, *tensors, learner=learner)[0]

        out = checkpoint(solve, *given, use_reentrant=False) if again else solve(*given)
        out.square().sum().backward()
        return [t.grad for t in given if t.grad is not None]

    once, twice, walked = gradients(run.layer.number, False), gradients(run.layer.number, True), gradients(0, False)
    assert all(torch.equal(a, b) for a, b in zip(once, twice))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(once, walked)) and once[0].abs().max() > 1e-3
