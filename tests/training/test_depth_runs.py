"""Looped models in training: on two ranks with ZeRO as on one, with the same number of loops drawn on both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.studies import looped
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


@pytest.mark.parametrize(
    "words, said", [(["--steps", "-1"], "--steps must be above zero"), (["--arms", "loped"], "did you mean 'looped'?")]
)
def test_what_the_study_cannot_run_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path / "out.json"), *words])
    with pytest.raises(SystemExit):
        looped.main()
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_symbols_lie_as_far_from_their_answers_as_the_loops_reach() -> None:
    """With a second mark before the answer: n + 1 places to copy (twice as many if copies come later), twice the number of the answer to reverse."""
    lengths, draw = torch.tensor([5, 5, 3]), torch.Generator().manual_seed(0)
    for task, later, far in (
        ("copy", False, lambda n, i: n + 1),
        ("copy", True, lambda n, i: 2 * (n + 1)),
        ("reverse", True, lambda n, i: 2 * (i + 1)),
    ):
        ids, labels = looped.rows_of(3, lengths, draw, (task,), 10, start=True, later=later)
        for row, n in enumerate(lengths.tolist()):
            asked = (labels[row] != -100).nonzero().flatten().tolist()
            mark = 2 * n + 2 if later and task == "copy" else n + 1
            assert asked == list(range(mark, mark + n)) and ids[row, mark] == looped.START
            assert (ids[row, mark + n :] == looped.PAD).all() and (ids[row, n + 1 : mark] == looped.PAD).all()
            assert all(labels[row, place] == ids[row, place - far(n, i)] for i, place in enumerate(asked))
        seen, unseen = (
            looped.rows_of(3, lengths, torch.Generator().manual_seed(1), (task,), 10, start=True, unseen=hidden) for hidden in (False, True)
        )
        assert torch.equal(seen[1], unseen[1])
        mark = looped.COPY if task == "copy" else looped.REVERSE
        for row, n in enumerate(lengths.tolist()):
            assert torch.equal(seen[0][row, : n + 2], unseen[0][row, : n + 2]) and (unseen[0][row, n + 2 : 2 * n + 1] == mark).all()


def test_what_it_does_not_go_with_is_a_sentence() -> None:
    with pytest.raises(UserError) as caught:
        checked(compose_config(["experiment=recurrent_depth", "deepspeed.stage=3", "train.initial_state=pass", "data.path=x"]))
    assert "take stage 2" in str(caught.value) and "set it to zero" in str(caught.value)
    with pytest.raises(UserError, match="models.depth holds recurrent, universal"):
        checked(compose_config(["experiment=recurrent_depth", "model.depth.type=deep", "data.path=x"]))
    with pytest.raises(UserError, match="leave no layer of 4"):
        checked(compose_config(["experiment=recurrent_depth", "model.depth.prelude=3", "data.path=x"]))
