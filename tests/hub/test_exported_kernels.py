"""The kernels in exported code, in Triton's interpreter (a process of its own)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import run_program

pytest.importorskip("triton")


def test_exported_kernels_give_the_checkpoints_numbers(tmp_path: Path) -> None:
    modules = str(tmp_path / "modules")
    done = run_program(["-m", "tests.hub.exported_kernels", str(tmp_path)], TRITON_INTERPRET="1", HF_MODULES_CACHE=modules)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ok", done.stdout[-2000:] + done.stderr[-3000:]
