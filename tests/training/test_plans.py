"""Plans of dense heads that are learnt in training: what is chosen, and that a run goes on with them bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kernels.dense_rnn import dense_rnn, large, reference
from kernels.dense_rnn.plans import GAIN, PERIOD, STALE, Pass, Plans
from models.cells import load_cell
from tests.kernels.dense_rnn_cases import problem

DENSE = [
    "model=dense_lstm",
    "train.seq_len=256",
    "train.global_batch=2",
    "train.micro_batch=1",
    "eval=end",
    "eval.tokens=256",
    "eval.sample_tokens=1",
    "schedule=constant",
    "model.n_layers=1",
]


def settled(needs: dict[tuple[int, int], tuple[float, float]], reckoned: int = 16, T: int = 1024, choices: int = 40) -> Pass:
    """Where choices end if a plan of these (slices, burn-in) needs so many corrections and walks such a share; others need 6 and walk all."""
    one = Pass()
    for _ in range(choices):
        n, W = one.plan(reckoned, T)
        corrections, share = (0.0, 0.0) if n == 1 else needs.get((n, W), (6.0, 1.0))
        one.add(corrections, share * n, n, 1)
        one.decide()
    return one


def test_the_cheapest_plan_is_found_and_kept() -> None:
    easy = {(16, W): (0.0, 0.0) for W in (0, 16, 32, 64)}
    assert settled(easy).plan(16, 1024) == (16, 0)
    memory = {(16, 0): (4.0, 0.0), (16, 16): (3.0, 0.0), (16, 32): (2.0, 0.0), (16, 64): (0.0, 0.0)}
    assert settled(memory).plan(16, 1024) == (16, 64)
    long_slices = {(8, W): (0.0, 0.0) for W in (0, 16, 32, 64)}
    assert settled(long_slices).plan(16, 1024)[0] == 8
    assert settled({}).plan(16, 1024)[0] == 1  # walked in order


def test_another_plan_is_tried_again_when_weights_may_have_changed() -> None:
    one = settled({})
    tried = set()
    for _ in range(2 * STALE):
        n, W = one.plan(16, 1024)
        tried.add(n)
        one.add(0.0, 0.0, n, 1)
        one.decide()
    assert max(tried) == 16 and one.plan(16, 1024) == (16, 0) and GAIN < 1


def test_a_large_head_begins_with_a_burn_in_and_learns_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "multiprocessors", lambda device: 132)
    cell, pre = load_cell("dense_lstm"), torch.empty(16, 1024, 4, 256, dtype=torch.bfloat16, device="meta")
    layer = Plans(1, torch.device("cpu")).layers[0]
    plan = large.in_force(cell, pre, 256, layer, False)
    assert plan.slices > 1 and plan.burn_in == reference.BURN_IN == large.in_force(cell, pre, 256, None, False).burn_in
    states = layer.passes[0]
    states.add(0.0, 0.0, plan.slices, 1)
    states.decide()
    states.burn_in = 0
    assert large.in_force(cell, pre, 256, layer, False).burn_in == 0
    assert Pass().plan(16, 1024, 24) == (16, 32) and Pass().plan(16, 1024, 100) == (16, 64)


def test_a_layer_solves_by_its_plan_and_says_what_it_needed() -> None:
    cell, tensors, _ = problem("dense_lstm", 1, 256, 1, 16)
    plans = Plans(1, torch.device("cpu"))
    plans.layers[0].passes[0].burn_in, plans.layers[0].passes[1].halvings = 16, 9
    given = [t.float().requires_grad_() for t in tensors]
    emitted, _ = dense_rnn(cell, *given, learner=plans.layers[0].number)
    assert reference.last_report.slices == 4
    emitted.sum().backward()
    assert reference.last_backward.slices == 1
    plans.collect()
    corrections, walked, slices, *back = plans.words()
    assert corrections == reference.last_report.corrections >= 1 and (walked, slices) == (0, 4) and back == [0, 0, 0]
    assert not plans.counters.any()
    assert not any(plans.decide([corrections * 2, 0, 8, 0, 0, 0], 2) for _ in range(PERIOD - 1))
    again = Plans(1, torch.device("cpu"))
    again.load(json.loads(json.dumps(plans.state())))
    assert again.decide([9, 0, 8, 0, 0, 0], 2) == plans.decide([9, 0, 8, 0, 0, 0], 2) and again.state() == plans.state()
    with pytest.raises(ValueError, match="there are 2"):
        Plans(2, torch.device("cpu")).load(plans.state())


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_bit_for_bit(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Cut between two choices of the plan; in the whole run the plan changes at step 8."""
    for name, steps in (("whole", 9), ("cut", 5), ("cut", 9)):
        done = train(name, *DENSE, f"train.steps={steps}")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    whole, cut = (newest(tmp_path / name) for name in ("whole", "cut"))
    states = [json.loads((folder / "state.json").read_text())["plans"] for folder in (whole, cut)]
    assert states[0] == states[1] and states[0]["layers"][0][0]["burn_in"] != 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    told = next(row for row in rows if "dense_corrections" in row)
    assert told["dense_corrections"] >= 1 and told["dense_walked_backward"] == 0 and told["dense_slices"] == 4
    weights = [load_file(next(folder.glob("model*.safetensors"))) for folder in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def newest(run: Path) -> Path:
    return max((path.parent for path in run.rglob("state.json")), key=lambda folder: folder.name)
