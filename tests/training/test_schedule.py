"""Schedules against their definitions."""

from __future__ import annotations

import math

import pytest

from training.schedule import lr_factor


def test_warmup_is_linear_and_never_zero() -> None:
    assert [lr_factor(s, 100, kind="cosine", warmup=4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("step", [10, 37, 99])
def test_cosine_against_its_formula(step: int) -> None:
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))
    assert lr_factor(step, 100, kind="cosine", warmup=10, final=0.1) == pytest.approx(expected)


def test_wsd_is_flat_then_falls_to_its_end() -> None:
    values = [lr_factor(s, 100, kind="wsd", warmup=0, decay=20) for s in range(101)]
    assert values[0] == values[79] == 1.0 and values[90] == pytest.approx(0.5) and values[100] == 0.0


def test_linear_and_unknown() -> None:
    assert lr_factor(50, 100, kind="linear", warmup=0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="choose one of"):
        lr_factor(0, 10, kind="step", warmup=0)
