"""The kernels in exported code, in Triton's interpreter (a process of its own)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

pytest.importorskip("triton")


def test_exported_kernels_give_the_checkpoints_numbers(tmp_path: Path) -> None:
    settings = environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT), HF_MODULES_CACHE=str(tmp_path / "modules"))
    command = [sys.executable, str(Path(__file__).with_name("exported_kernels.py")), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ok", done.stdout[-2000:] + done.stderr[-3000:]
