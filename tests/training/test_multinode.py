"""Two machines, played by two launchers of this one: the curve is that of one machine, and survives the loss of either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, environment, free_port
from tests.training.test_runs import QUIET, losses, ok
from training.supervisor import descendants

SCRIPT = str(ROOT / "scripts" / "train_multinode.sh")
NODES = "node-a slots=1\nnode-b slots=1\n"


def start(hosts: Path, node: int, port: str, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    env = environment(NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, PYTHON=sys.executable)
    return subprocess.Popen(
        [SCRIPT, str(hosts), *words], cwd=ROOT, env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT, start_new_session=True
    )


@pytest.mark.slow
def test_two_machines_and_the_loss_of_one(
    train: Callable[..., subprocess.CompletedProcess[str]], demo_shards: Path, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(NODES)
    common = [*QUIET, "train.steps=20", "train.micro_batch=2", "checkpoint.every=1"]
    ok(train("one", *common))
    words = [*SMALL, f"data.path={demo_shards}", f"run_dir={tmp_path / 'two'}", *common]
    port, metrics = free_port(), tmp_path / "two" / "metrics.jsonl"
    jobs = [start(hosts, node, port, words, tmp_path / f"first-{node}.log") for node in range(2)]
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert all(job.poll() is None for job in jobs), (tmp_path / "first-0.log").read_text()[-3000:]
        time.sleep(0.02)
    for pid in [jobs[1].pid, *descendants(jobs[1].pid)]:
        os.kill(pid, signal.SIGKILL)
    for job in jobs:
        assert job.wait(timeout=60) != 0
    assert max(losses(tmp_path / "two")) < 20
    ok(train("two", *common, ranks=2))  # tests/training/test_two_machines.py has torchrun on two machines
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and all(abs(one[s] / two[s] - 1) < 1e-5 for s in one)


@pytest.mark.parametrize(
    "extra, part",
    [
        ({"NODE_RANK": "1"}, "MASTER_ADDR"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "x"}, "names 2 machine"),
        ({"LAUNCHER": "mpi"}, "choose"),
        ({"LAUNCHER": "torchrun"}, "NODE_RANK"),
        ({"PYTHON": "/no such/python"}, "there is no program /no such/python"),
        ({"MASTER_PORT": "99999999999999999999"}, "must be a port"),
        ({}, "start on each machine with its NODE_RANK"),
    ],
)
def test_mistakes_are_sentences(extra: dict[str, str], part: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(NODES)
    done = subprocess.run([SCRIPT, str(hosts), "a=1"], env=environment(**extra), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "hosts, part",
    [
        ("", "names no machine"),
        ("# none\n\n", "names no machine"),
        ("node-a:8\n", "says 'node-a:8'"),
        ("node-a\n", "slots=GPUS"),
        ("node-a slots=0\n", "slots=GPUS"),
        ("node-a max_slots=8\n", "slots=GPUS"),
        ("node-a slots=1\nnode-a slots=1\n", "twice"),
        ("\ufeffnode-a slots=1\n", "byte-order mark"),
    ],
)
def test_a_host_file_that_says_nothing_useful_is_a_sentence(hosts: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(hosts)
    env = environment(NODE_RANK="0", MASTER_ADDR="127.0.0.1", LAUNCHER="torchrun")
    done = subprocess.run([SCRIPT, str(tmp_path / "hosts"), "a=1"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("hosts", ["node-a slots=8 max_slots=16\n", "# ours\r\n  node-a slots=8 max_slots=16  # größte\r\n\r\n"])
@pytest.mark.parametrize(
    "launcher,words",
    [
        ("torchrun", "--nnodes 1 --node_rank 0 --nproc_per_node 8 --master_addr 127.0.0.1 "),
        ("deepspeed", "--no_local_rank --no_ssh --node_rank 0 --master_addr 127.0.0.1 "),
    ],
)
def test_a_machine_alone_starts_its_slots_and_needs_no_ssh(hosts: str, launcher: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "größte 1"
    folder.mkdir()
    (folder / "hosts").write_text(hosts)
    (folder / "python").write_text('#!/bin/sh\necho "$@"\n')
    (folder / "python").chmod(0o755)
    env = environment(LAUNCHER=launcher, PYTHON="./python", MASTER_PORT=free_port())
    done = subprocess.run([SCRIPT, "hosts", "a=b c"], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and words in done.stdout and done.stdout.endswith(" train.py a=b c\n"), done.stderr
