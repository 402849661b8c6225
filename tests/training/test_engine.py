"""The end of an engine, and what a single rank runs; what its steps compute is compared in test_matrix.py, test_runs.py and tests/parallel."""

from __future__ import annotations

import pytest

from tests.conftest import run_program, run_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_that_ends_leaves_neither_its_model_nor_another_linear_map(ranks: int) -> None:
    done = run_ranks(ranks, ["tests/training/ends.py"])
    assert done.returncode == 0 and f"ok {ranks}" in done.stdout, done.stdout + done.stderr
    assert "deprecated" not in done.stderr, "a warning that the person who trains can do nothing about"


def test_an_update_that_the_device_decides_on_is_the_one_that_the_host_would_have_made() -> None:
    """Through losses and gradients that are not finite: the same weights, moments and counts of steps bit for bit, without waiting for the loss."""
    done = run_program(["tests/training/decided.py"], TRITON_INTERPRET="1")
    assert done.returncode == 0 and "ok" in done.stdout, done.stdout + done.stderr
