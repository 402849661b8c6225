"""Looped models in training: on two ranks with ZeRO as on one, with the same number of loops drawn on both."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from training.config.cli import checked, compose_config
from training.errors import UserError

Train = Callable[..., subprocess.CompletedProcess[str]]
LOOPED = [
    "model.n_layers=4",
    "+model.depth.type=recurrent",
    "+model.depth.loops=3",
    "+model.depth.backprop=2",
    "train.micro_batch=2",
    "eval.every=0",
]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_ranks_with_zero_draw_the_loops_of_one(train: Train, tmp_path: Path) -> None:
    for name, ranks in (("one", 1), ("two", 2)):
        done = train(name, *LOOPED, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert all(abs(a - b) < 2e-5 for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True))


def test_what_it_does_not_go_with_is_a_sentence() -> None:
    with pytest.raises(UserError) as caught:
        checked(compose_config(["experiment=recurrent_depth", "deepspeed.stage=3", "train.initial_state=pass", "data.path=x"]))
    assert "take stage 2" in str(caught.value) and "set it to zero" in str(caught.value)
    with pytest.raises(UserError, match="models.depth holds recurrent, universal"):
        checked(compose_config(["experiment=recurrent_depth", "model.depth.type=deep", "data.path=x"]))
    with pytest.raises(UserError, match="leave no layer of 4"):
        checked(compose_config(["experiment=recurrent_depth", "model.depth.prelude=3", "data.path=x"]))
