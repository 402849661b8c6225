"""Step sizes and widths of values that no model can be drawn with are refused, by every mixer that has them."""

from __future__ import annotations

import math

import pytest

from models import mixers


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in ("delta", "m2rnn", "mamba2") for key in ("dt_max", "dt_floor")]
    + [(kind, "expand_v") for kind in ("delta", "m2rnn")]
    + [(kind, "dt_max") for kind in ("lti", "miras")],
)
def test_what_is_not_finite_or_above_zero_is_refused(kind: str, key: str, value: float) -> None:
    _, problems = mixers.parse("x", {"type": kind, key: value}, 128)
    assert len(problems) == 1 and key in problems[0]
    assert mixers.parse("x", {"type": kind}, 128)[1] == []
