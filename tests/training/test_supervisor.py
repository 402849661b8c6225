"""The supervisor over small stand-in jobs: each scripted failure, with its exit status and with no process left over."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from training import supervisor
from training.errors import STOPPED, UserError
from training.supervisor import MISTAKE, STUCK, USED_UP, Settings, Supervisor, descendants, parse
from training.watch import observe

RANK = f"""
import json, os, socket, subprocess, sys, time, pathlib
folder = pathlib.Path(os.environ["{observe.FOLDER}"])
tries = folder / "tries"
n = int(tries.read_text()) + 1 if tries.exists() else 1
def beat(step, saved, rank=0):
    part = folder / "part"
    part.write_text(json.dumps(dict(host=socket.gethostname(), pid=os.getpid(), step=step, saved=saved)))
    os.replace(part, folder / f"rank-{{rank:05d}}.json")
tries.write_text(str(n))
"""


def supervise(tmp_path: Path, script: str, **settings: Any) -> tuple[int, list[str], Supervisor]:
    said: list[str] = []
    (tmp_path / "job.py").write_text(RANK + script)
    made = Supervisor(
        Settings(folder=str(tmp_path / "ranks"), **{"backoff": 0.0, **settings}), [sys.executable, str(tmp_path / "job.py")], said.append
    )
    before = set(descendants(os.getpid()))
    status = made.run()
    assert set(descendants(os.getpid())) <= before, "processes were left behind"
    return status, said, made


def tries(tmp_path: Path) -> int:
    return int((tmp_path / "ranks" / "tries").read_text())


def test_a_job_that_fails_with_new_checkpoints_is_restarted_until_it_finishes(tmp_path: Path) -> None:
    status, said, made = supervise(tmp_path, "beat(n * 10, n * 10); sys.exit(0 if n == 4 else 1)", restarts=5)
    assert status == 0 and tries(tmp_path) == 4
    assert sum(line.startswith("restart ") for line in said) == 3 and "from step 30" in "".join(said)
    rows = [json.loads(line) for line in (tmp_path / "ranks" / "supervisor.jsonl").read_text().splitlines()]
    assert [r["attempt"] for r in rows] == [1, 2, 3, 4]


def test_restarts_run_out_stand_still_and_mistakes_are_told_apart(tmp_path: Path) -> None:
    for name, script, restarts, wanted, attempts in [
        ("out", "beat(n, n); sys.exit(1)", 2, USED_UP, 3),
        ("still", "beat(7, 0); sys.exit(1)", 9, STUCK, 2),
        ("mute", "sys.exit(1)", 9, STUCK, 2),
        ("mistake", "sys.exit(2)", 9, MISTAKE, 1),
        ("killed", "beat(n, n); os.kill(os.getpid(), 9)", 1, USED_UP, 2),
    ]:
        (tmp_path / name).mkdir()
        status, _, _ = supervise(tmp_path / name, script, restarts=restarts)
        assert (status, tries(tmp_path / name)) == (wanted, attempts), name


def test_children_in_sessions_of_their_own_do_not_outlive_a_dead_launcher(tmp_path: Path) -> None:
    script = """
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
for _ in range(2):
    p = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
    p.stdout.readline()
os.kill(os.getpid(), 9)
"""
    status, said, _ = supervise(tmp_path, script, restarts=0)
    assert status == USED_UP and any("killed 2 process(es)" in line for line in said)


def test_a_hung_rank_writes_its_stacks_and_is_restarted(tmp_path: Path) -> None:
    script = f"""
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from training.watch.observe import SignOfLife
if n > 1:
    sys.exit(0)
life = SignOfLife(pathlib.Path("/nowhere"), 3)
life.beat(1, 1)
def the_collective_that_never_ends():
    time.sleep(300)
the_collective_that_never_ends()
"""
    status, said, _ = supervise(tmp_path, script, restarts=1, timeout=1.5)
    assert status == 0 and tries(tmp_path) == 2
    assert any("no rank took a step" in line and "rank-00003.stacks" in line for line in said)
    assert "the_collective_that_never_ends" in (tmp_path / "ranks" / "attempt-1-rank-00003.stacks").read_text()


def test_a_disk_whose_clock_is_wrong_makes_no_hang(tmp_path: Path) -> None:
    script = """
for step in range(1, 9):
    beat(step, 0)
    os.utime(folder / "rank-00000.json", (step * 1000, step * 1000) if step % 2 else (4e9 + step, 4e9 + step))
    time.sleep(0.3)
sys.exit(0)
"""
    status, said, _ = supervise(tmp_path, script, restarts=0, timeout=1.5, startup=30)
    assert status == 0 and not any("no rank took a step" in line for line in said)


def test_a_stop_request_reaches_the_ranks_but_not_the_launcher(tmp_path: Path) -> None:
    script = """
import signal
if len(sys.argv) == 1:   # the launcher: a TERM would kill it, and its status is the rank's
    sys.exit(subprocess.call([sys.executable, __file__, "rank"]))
def stop(*_):
    (folder / "saved_in_peace").write_text("yes"); sys.exit(0)
signal.signal(signal.SIGTERM, stop)
beat(5, 5); (folder / "ready").write_text("")
time.sleep(300)
"""

    def press() -> None:
        while not (tmp_path / "ranks" / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=press, daemon=True).start()
    status, said, _ = supervise(tmp_path, script, restarts=3)
    assert status == STOPPED and (tmp_path / "ranks" / "saved_in_peace").exists()
    assert "stopped on SIGTERM" in said[-1]


def test_a_stop_request_from_elsewhere_is_no_failure(tmp_path: Path) -> None:
    """Ranks that got a signal themselves end with 75; a launcher makes another status of it, and then their files say it."""
    rank = """
sys.path.insert(0, ROOT)
from training.watch.observe import SignOfLife
life = SignOfLife(pathlib.Path("/nowhere"), 0)
life.beat(5, 5)
life.close(stopped=STOPPED)
sys.exit(STATUS)
""".replace("ROOT", repr(str(Path(__file__).resolve().parents[2])))
    for name, stopped, status, wanted, attempts in [
        ("own", "False", 75, STOPPED, 1),
        ("launcher", "True", 1, STOPPED, 1),
        ("failed", "False", 1, USED_UP, 2),
    ]:
        (tmp_path / name).mkdir()
        ended, said, _ = supervise(tmp_path / name, rank.replace("STOPPED", stopped).replace("STATUS", str(status)), restarts=1)
        assert (ended, tries(tmp_path / name)) == (wanted, attempts), (name, said)


def test_a_train_resume_holds_until_a_checkpoint_was_written_after_it(tmp_path: Path) -> None:
    script = """
resume, began, ended = sys.argv[1].partition("=")[2], *[(100, 100), (100, 300), (300, 350)][n - 1]
with (folder / "seen").open("a") as seen:
    seen.write(resume + " ")
beat(began, began); time.sleep(0.5)
beat(ended, ended)
sys.exit(0 if n == 3 else 1)
"""
    (tmp_path / "ranks").mkdir()
    (tmp_path / "job.py").write_text(RANK + script)
    old = {"host": socket.gethostname(), "pid": 1, "step": 500, "saved": 500}  # what the abandoned branch had reached
    (tmp_path / "ranks" / "rank-00000.json").write_text(json.dumps(old))
    command = [sys.executable, str(tmp_path / "job.py"), "train.resume=older"]
    made = Supervisor(Settings(folder=str(tmp_path / "ranks"), backoff=0.0), command, lambda text: None)
    assert made.run() == 0 and (tmp_path / "ranks" / "seen").read_text() == "older older auto "


def test_the_files_of_another_machines_ranks_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    other = json.dumps({"host": "another", "pid": 1, "step": 3, "saved": 2})
    (tmp_path / "ranks" / "rank-00001.json").write_text(other)
    (tmp_path / "ranks" / "rank-00001.stacks").write_text("")
    script = """
for _ in range(8):   # the other machine's ranks do not make up for the silence of this one's
    beat(1, 0) if _ == 0 else (folder / "rank-00001.json").touch(); time.sleep(0.3)
"""
    status, said, _ = supervise(tmp_path, script, restarts=0, timeout=1)
    assert status == USED_UP and any("no rank took a step" in line for line in said)
    assert (tmp_path / "ranks" / "rank-00001.json").read_text() == other and (tmp_path / "ranks" / "rank-00001.stacks").exists()


def test_a_terminal_that_closes_stops_the_job_unless_under_nohup(tmp_path: Path) -> None:
    script = """
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
beat(1, 0); os.kill(os.getppid(), signal.SIGHUP); time.sleep(3)
"""
    assert supervise(tmp_path, script)[0] == STOPPED
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert supervise(tmp_path, script)[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_does_not_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); beat(1, 0); (folder / 'ready').write_text(''); time.sleep(300)"

    def press() -> None:
        while not (tmp_path / "ranks" / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    status, said, _ = supervise(tmp_path, script, grace=0.3)
    assert status == STOPPED and any("still running" in line for line in said)


def test_mistakes_in_the_call_are_sentences(tmp_path: Path) -> None:
    for arguments, words in [
        (["true"], "'--' is missing"),
        (["restart=3", "--", "true"], "the options are restarts="),
        (["restarts=x", "--", "true"], "whole number"),
        (["timeout=-1", "--", "true"], "zero or more"),
        (["timeout=nan", "--", "true"], "zero or more"),
        (["--"], "no command"),
        (["--", "no-such-program"], "no program"),
    ]:
        with pytest.raises(UserError, match=words):
            parse(arguments)
    with pytest.raises(UserError) as both:
        parse(["a=1", "timeout=x", "--"])
    assert len(both.value.problems) == 3
    assert parse(["--", "true", "run_dir=here"])[0].folder == "here/supervisor"
    assert supervisor.main(["true"]) == MISTAKE


def test_signs_of_life_are_files_that_name_host_process_step_and_save(tmp_path: Path) -> None:
    life = observe.SignOfLife(tmp_path, 2)
    life.beat(7, 4)
    row = json.loads((tmp_path / "ranks" / "rank-00002.json").read_text())
    assert row == {"host": socket.gethostname(), "pid": os.getpid(), "step": 7, "saved": 4}
    os.kill(os.getpid(), signal.SIGUSR2)
    life.close()
    assert "test_signs_of_life" in (tmp_path / "ranks" / "rank-00002.stacks").read_text()
