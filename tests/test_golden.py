"""The losses of training are those that are stored, and the comparison sees what differs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from scripts.check import golden
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


def test_losses_are_renewed_with_a_reason_and_compared_with_the_right_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b")
    golden.git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "other").write_text("1")
    golden.git(tmp_path, "add", "other")
    golden.git(tmp_path, "commit", "-q", "-m", "first")
    golden.renew(tmp_path, LOSSES, "the norm is rounded once", "a machine")
    assert golden.git(tmp_path, "log", "-1", "--format=%s") == "Golden losses renewed: the norm is rounded once"
    assert json.loads((tmp_path / STORED).read_text())["losses"] == LOSSES
    assert golden.base_commit(tmp_path) == "HEAD~1"
    (tmp_path / "other").write_text("2")
    assert golden.base_commit(tmp_path) == "HEAD"
    first = golden.git(tmp_path, "rev-parse", "HEAD")
    golden.git(tmp_path, "checkout", "-q", "-b", "branch")
    golden.git(tmp_path, "commit", "-q", "-a", "-m", "second")
    assert golden.base_commit(tmp_path) == first
    with pytest.raises(golden.UserError, match="There is no commit and no file 'nowhere'"):
        golden.unpack(tmp_path, "nowhere", tmp_path / "base")
    with pytest.raises(golden.UserError, match="leave out only="):
        golden.main(["renew=why", "only=hybrid"])


def test_the_faults_that_are_put_in_to_be_caught_stand_in_the_code_as_it_is() -> None:
    """scripts/check/faults.py takes minutes to put each in; that it still can is seen here."""
    from scripts.check.faults import FAULTS, place

    assert all(place(fault).exists() and fault.text != fault.becomes for fault in FAULTS.values())
