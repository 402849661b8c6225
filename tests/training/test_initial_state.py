"""Initial states of training sequences: against the same text fed whole, and against plain statistics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import ModelConfig
from models.lm import LanguageModel
from training.config.schema import STARTS
from training.initial_state import MODES, InitialStates

PATTERN = ["m", "g", "a"]


def model(pattern: list[str] = PATTERN) -> LanguageModel:
    mixers = {
        "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
        "g": {"type": "rnn", "cell": "paralstm", "n_heads": 2},
        "a": {"type": "attention", "n_heads": 2},
    }
    built = LanguageModel(ModelConfig(vocab_size=64, d_model=32, n_layers=len(pattern), pattern=pattern, mixers=mixers))
    built.init_weights(0)
    return built


def ids(T: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(64, (rows, T), generator=torch.Generator().manual_seed(1))


def test_passing_over_a_stream_goes_on_with_the_text_and_stops_the_gradient() -> None:
    lm, x = model(["m", "g"]), ids(41)
    segments = torch.tensor([0] * 15 + [1] * 12 + [2] * 14).expand(4, 41)  # documents end inside pieces and at their borders (27)
    whole = lm(x[:, :-1], labels=x[:, 1:], segment_ids=segments[:, :-1], reduction="none").token_nll
    initial, parts = InitialStates("pass", drop=0.0), []
    for a, b in ((0, 13), (13, 27), (27, 40)):
        state = initial.before(lm, 0, 4, segments[:, a:b], stream=True)
        assert all(not t.requires_grad for part in state.layers for t in vars(part).values() if isinstance(t, torch.Tensor))
        output = lm(x[:, a:b], labels=x[:, a + 1 : b + 1], segment_ids=segments[:, a:b], state=state, reduction="none")
        initial.after(0, output.state)
        parts.append(output.token_nll)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_passing_between_unrelated_windows_is_not_undone_by_their_segments() -> None:
    lm, x = model(["m", "g"]), ids(32)
    initial = InitialStates("pass", drop=0.0)
    zeros = torch.zeros(4, 16, dtype=torch.int32)
    first = lm(x[:, :16], labels=x[:, :16], segment_ids=zeros, state=initial.before(lm, 0, 4, zeros))
    initial.after(0, first.state)
    passed = lm(x[:, 16:], segment_ids=zeros + 5, state=initial.before(lm, 0, 4, zeros + 5)).logits
    torch.testing.assert_close(passed, lm(x).logits[:, 16:], atol=1e-5, rtol=1e-5)
    dropped = InitialStates("pass", drop=1.0)
    dropped.after(0, first.state)
    torch.testing.assert_close(lm(x[:, 16:], state=dropped.before(lm, 0, 4)).logits, lm(x[:, 16:]).logits, atol=1e-5, rtol=1e-5)
    assert initial.before(lm, 0, 3).layers[0].ssm_BHPN.abs().sum() == 0  # another batch size: nothing to pass
    assert initial.before(lm, 1, 4).layers[0].ssm_BHPN.abs().sum() == 0  # another slot


def test_attention_starts_empty_in_every_mode() -> None:
    lm, x = model(), ids(16)
    for mode in MODES[1:]:
        initial = InitialStates(mode, drop=0.0)
        for _ in range(3):
            state = initial.before(lm, 0, 4)
            assert state.layers[2].k_BGLK.shape[2] == 0 and state.layers[2].seen == 0
            output = lm(x, labels=x, state=state)
            initial.after(0, output.state)
        output.loss_sum.backward()
    assert InitialStates("zero").before(lm, 0, 4) is None and MODES == STARTS


def test_noise_has_the_wanted_moments() -> None:
    lm, x = model(["m", "g"]), ids(16, 64)
    state = InitialStates("random", sigma=0.5, drop=0.25, seed=3).before(lm, 0, 64)
    ssm, cell = state.layers[0].ssm_BHPN, state.layers[1].cell_BSI
    started = ssm.flatten(1).abs().sum(1) > 0
    assert 38 <= int(started.sum()) <= 58 and torch.equal(started, cell.flatten(1).abs().sum(1) > 0)
    assert float(ssm[started].std()) == pytest.approx(0.5, rel=0.02) and state.layers[0].conv_BWI.abs().sum() == 0
    fitted = InitialStates("fitted", drop=0.0, momentum=0.5)
    assert fitted.before(lm, 0, 64).layers[0].ssm_BHPN.abs().sum() == 0  # nothing met yet
    ends: list[Any] = []
    for shift in (0, 1):
        with torch.no_grad():
            end = lm(x, labels=x, state=lm.init_state(64)).state
            end.layers[0].ssm_BHPN[:, 1].mul_(3).add_(shift)
        fitted.after(0, end)
        ends.append(end.layers[0].ssm_BHPN.detach())
    drawn = torch.cat([fitted.before(lm, 0, 64).layers[0].ssm_BHPN for _ in range(20)])
    for head in range(4):
        mean = sum(float(e[:, head].mean()) for e in ends) / 2
        std = sum(float(e[:, head].std()) for e in ends) / 2
        assert float(drawn[:, head].mean()) == pytest.approx(mean, abs=0.03 * std + 1e-6)
        assert float(drawn[:, head].std()) == pytest.approx(std, rel=0.03)


def test_draws_of_a_step_do_not_depend_on_the_steps_before_it() -> None:
    lm, whole, resumed = model(["m", "g"]), InitialStates("random", drop=0.5, seed=3), InitialStates("random", drop=0.5, seed=3)
    steps = []
    for step in range(3):
        whole.begin_step(step)
        steps.append([whole.before(lm, slot, 4).layers[0].ssm_BHPN for slot in range(2)])
    resumed.begin_step(2)
    again = [resumed.before(lm, slot, 4).layers[0].ssm_BHPN for slot in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(steps[2], again)) and not torch.equal(steps[2][0], steps[1][0])


def test_a_dropped_state_is_gone_though_it_is_not_finite() -> None:
    lm = model(["m", "g"])
    initial = InitialStates("pass", drop=1.0)
    state = lm(ids(9), state=lm.init_state(4)).state
    for part in state.layers:
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.detach().fill_(torch.nan)
    initial.after(0, state)
    dropped = initial.before(lm, 0, 4)
    assert lm(ids(9), state=dropped).logits.isfinite().all()


@pytest.mark.parametrize("mode", ["pass", "fitted"])
def test_a_state_that_is_not_finite_is_nobodys_start(mode: str) -> None:
    """One bad row of one step, which faults.policy=skip leaves out: the others go on from theirs, and it from zero."""
    lm, initial = model(["m", "g"]), InitialStates(mode, drop=0.0)
    first, bad = (lm(ids(9), state=lm.init_state(4)).state for _ in range(2))
    initial.before(lm, 0, 4)
    initial.after(0, first)
    bad.layers[0].ssm_BHPN.detach()[2] = torch.nan
    initial.after(0, bad)
    start = initial.before(lm, 0, 4)
    assert lm(ids(9), state=start).logits.isfinite().all()
    if mode == "pass":
        others, cell = [0, 1, 3], start.layers[1].cell_BSI
        assert not cell[2].any() and torch.equal(cell[others], bad.layers[1].cell_BSI[others])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="choose one of zero, pass"):
        InitialStates("warm")
    with pytest.raises(ValueError, match="drop must lie"):
        InitialStates("pass", drop=2.0)


def test_a_run_with_passed_states_and_a_long_curve(train: Callable[..., Any], tmp_path: Path) -> None:
    words = [
        "train.steps=4",
        "train.initial_state=pass",
        "data.reader=stream",
        "eval.long_length=512",
        "eval.long_rows=2",
        "eval=end",
        "eval.tokens=256",
    ]
    done = train("passed", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "position curve to 512 tokens" in done.stdout
    report = json.loads((tmp_path / "passed" / "eval.json").read_text())
    assert report["perplexity"]["long"]["length"] == 512
    done = train("wrong", "train.initial_state=warm", "train.initial_drop=3")
    assert done.returncode == 2 and "train.initial_state is 'warm'" in done.stderr and "initial_drop" in done.stderr
