"""The end of a process: its status, what is still done, and what the threads of a process group cannot spoil any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

GLOO = """
import sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
held = dist.distributed_c10d._get_default_group()

def main():
    dist.destroy_process_group()
    sys.setswitchinterval(1e6)  # the threads below must wait for the interpreter, which ends
    for _ in range(4):
        held.allreduce([torch.ones(10)])
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    return 3
"""


def ended(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *words], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )


def test_threads_of_a_process_group_do_not_abort_a_finished_program(tmp_path: Path) -> None:
    done = ended(GLOO + "\nfrom training.launch import leave\nleave(main)\n", str(tmp_path / "group"))
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("return None", 0, ""),
        ("return 75", 75, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("sys.stdout = None", 0, ""),
    ],
)
def test_status_and_what_is_done_at_the_end_are_those_of_an_ordinary_end(end: str, status: int, said: str) -> None:
    program = f"""
import atexit, sys, threading, time
from training.launch import leave
class Last:
    def __del__(self):
        print("taken apart", file=sys.__stderr__)
last, out = Last(), sys.stdout
atexit.register(lambda: print("at exit", file=out))
def main():
    threading.Thread(target=lambda: (time.sleep(0.1), print("thread", file=out))).start()
    {end}
leave(main)
"""
    done = ended(program)
    assert (done.returncode, done.stdout, done.stderr) == (status, "thread\nat exit\n", said)


def test_an_error_that_nobody_expected_has_its_traceback() -> None:
    done = ended("from training.launch import leave\nleave(lambda: 1 / 0)")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_child_of_multiprocessing_leaves_what_its_parent_has_registered(tmp_path: Path) -> None:
    program = """
import multiprocessing, sys, tempfile
from pathlib import Path
from training.launch import leave
with tempfile.TemporaryDirectory() as folder:
    child = multiprocessing.get_context("fork").Process(target=leave, args=(lambda: 75,))
    child.start()
    child.join()
    print(child.exitcode, Path(folder).is_dir())
"""
    done = ended(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "75 True\n", "")
