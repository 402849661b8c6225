"""The losses of training are those that are stored, and the comparison sees what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from scripts.check.golden import ELSEWHERE_STEPS, ROOT, STEPS, STORED, cases, differences
from tests.conftest import run_program

LOSSES = json.loads((ROOT / STORED).read_text())["losses"]


def test_the_first_losses_are_the_stored_ones(tmp_path: Path) -> None:
    """All models and all steps: python -m scripts.check.golden against=stored."""
    words = ["against=stored", "only=hybrid", f"steps={ELSEWHERE_STEPS + 1}", "jobs=1", f"out={tmp_path / 'losses.json'}"]
    done = run_program(["-m", "scripts.check.golden", *words])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads((tmp_path / "losses.json").read_text())["losses"]["hybrid"]["loss"]) == ELSEWHERE_STEPS + 1


def test_every_model_is_stored() -> None:
    assert LOSSES.keys() == cases([ROOT]).keys()
    assert all(len(figures["loss"]) == STEPS and figures["loss"][-1] < figures["loss"][0] - 1 for figures in LOSSES.values())


def test_a_difference_in_the_last_bit_is_seen() -> None:
    changed = copy.deepcopy(LOSSES)
    changed["hybrid"]["loss"][9] *= 1 + 1e-15
    changed["mamba2"]["held_out"][0] *= 1 + 1e-15
    assert differences(LOSSES, LOSSES) == [] and differences(changed, LOSSES, tolerance=1e-5) == []
    assert [sentence.partition(" differs ")[0] for sentence in differences(changed, LOSSES)] == ["hybrid: loss", "mamba2: held_out"]
    assert "hybrid: loss differs from step 10 on" in differences(changed, LOSSES)[0]
    assert differences(changed, LOSSES, steps=9) == []
