"""Processes of a study do not outlive the one that started them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from scripts.studies.workers import end_with_parent
from tests.conftest import ROOT


def sleeper(file: str, follows: bool) -> None:
    """What the started process does: says its pid and sleeps."""
    import os

    if follows:
        end_with_parent()
    Path(file).with_suffix(".new").write_text(str(os.getpid()))
    Path(file).with_suffix(".new").rename(file)
    time.sleep(60)


START = """
import multiprocessing, sys
from tests.studies.test_workers import sleeper
process = multiprocessing.get_context("spawn").Process(target=sleeper, args=(sys.argv[1], sys.argv[2] == "True"))
process.start()
process.join()
"""


def test_a_process_ends_with_the_one_that_started_it_however_that_ended(tmp_path: Path) -> None:
    started = {}
    for follows in (True, False):
        file = tmp_path / f"{follows}"
        command = [sys.executable, "-c", START, str(file), str(follows)]
        started[follows] = file, subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    left = {}
    for follows, (file, process) in started.items():
        while not file.exists():
            assert process.poll() is None
            time.sleep(0.02)
        left[follows] = psutil.Process(int(file.read_text()))
        process.kill()
        process.wait()
    left[True].wait(timeout=30)
    assert left[False].is_running()  # what would be without
    left[False].kill()
