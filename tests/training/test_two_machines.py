"""Two machines with addresses, sshd and processes of their own, one of them killed in the middle; and the Slurm script with stub commands."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, environment, free_port, run_program
from tests.training.test_runs import QUIET, losses

STUBS = {
    # Two nodes: a step is a process for each, with the number Slurm gives it. --kill-on-bad-exit: the first to fail ends the other.
    "srun": """#!/usr/bin/env bash
while [ "${1#--}" != "$1" ]; do shift; done
pids=()
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
echo "${pids[@]}" >"$STUBS/pids"
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
""",
    "scontrol": """#!/usr/bin/env bash
case "$1" in
  show) printf 'node-a\\nnode-b\\n' ;;
  requeue) echo "$2" >"$STUBS/requeued" ;;
esac
""",
    "scancel": """#!/usr/bin/env bash
echo "$@" >"$STUBS/cancelled"
for pid in $(cat "$STUBS/pids"); do kill -TERM "$pid"; done
""",
}


@pytest.mark.slow
def test_a_machine_killed_in_the_middle_and_the_job_taken_up_again_over_ssh(demo_shards: Path, tmp_path: Path) -> None:
    done = run_program(["-m", "scripts.check.two_machines", f"data={demo_shards}", "slots=1", "steps=12", f"work={tmp_path}"], timeout=500)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes with one rank each, and stub commands first in PATH."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in {**STUBS, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    return environment(
        PATH=f"{stubs}:{os.environ['PATH']}", STUBS=str(stubs), SLURM_JOB_ID="17", SLURM_JOB_NODELIST="node-[a-b]", SLURM_GPUS_ON_NODE="1",
        SLURM_SUBMIT_DIR=str(tmp_path), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), RESTARTS="0",
    )  # fmt: skip


@pytest.mark.slow
def test_the_slurm_script_saves_and_queues_again_on_preemption(slurm: dict[str, str], demo_shards: Path, tmp_path: Path) -> None:
    run = [*SMALL, *QUIET, f"data.path={demo_shards}", f"run_dir={tmp_path / 'run'}", "train.micro_batch=2", "train.steps=100000"]
    words, metrics = ["bash", "scripts/train.sbatch", *run, "schedule=constant"], tmp_path / "run" / "metrics.jsonl"
    job = subprocess.Popen(words, cwd=ROOT, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert job.poll() is None, job.communicate()[0][-3000:]
        time.sleep(0.05)
    job.send_signal(10)  # SIGUSR1: what --signal=B:USR1@300 sends to the script
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 75, out[-3000:]
    stubs = Path(slurm["STUBS"])
    assert (stubs / "requeued").read_text().strip() == "17" and "17" in (stubs / "cancelled").read_text(), out[-3000:]
    reached = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{reached:08d}" / "COMPLETE.json").exists(), out[-3000:]
    assert not (tmp_path / "hosts.17").exists()


@pytest.mark.parametrize("restarts,resumes", [("0", "/elsewhere/step-00000003"), ("1", "auto")])
def test_a_job_that_was_queued_again_goes_on_from_what_it_saved_itself(slurm: dict[str, str], restarts: str, resumes: str) -> None:
    """And not from where it was told to begin."""
    (Path(slurm["STUBS"]) / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    words = ["bash", "scripts/train.sbatch", "name=a b", "train.resume=/elsewhere/step-00000003"]
    env = {**slurm, "SLURM_RESTART_COUNT": restarts}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == ["name=a b", f"train.resume={resumes}"], done.stdout + done.stderr
    assert not (Path(slurm["STUBS"]) / "requeued").exists()


@pytest.mark.parametrize("ends", ["at once", "while the script waits"])
@pytest.mark.parametrize("status,again", [(75, True), (0, False), (1, False), (2, False)])
def test_the_slurm_script_queues_again_by_the_status_of_a_stopped_run(
    slurm: dict[str, str], tmp_path: Path, status: int, again: bool, ends: str
) -> None:
    stub = Path(slurm["STUBS"]) / "srun"
    stub.write_text(f"#!/bin/sh\n{'sleep 0.5' if ends != 'at once' else ''}\nexit {status}\n")
    if ends == "at once":  # the script is held up where it sets its trap, so that the step is over before the script waits for it
        slow = tmp_path / "slow.sh"
        slow.write_text('trap() { builtin trap "$@"; sleep 0.5; }\n')
        slurm = {**slurm, "BASH_ENV": str(slow)}
    done = subprocess.run(
        ["bash", "scripts/train.sbatch", "a=1"], cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status and (Path(slurm["STUBS"]) / "requeued").exists() == again, done.stderr


@pytest.mark.parametrize("job,part", [("", "sbatch scripts/train.sbatch"), ("17", "is not the project's folder")])
def test_the_slurm_script_where_it_cannot_start_is_a_sentence(slurm: dict[str, str], tmp_path: Path, job: str, part: str) -> None:
    words, env = ["bash", str(ROOT / "scripts" / "train.sbatch"), "a=1"], {**slurm, "SLURM_JOB_ID": job}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.glob("hosts*"))


def test_the_slurm_script_does_not_queue_a_mistake_again(slurm: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "scripts/train.sbatch", "train.stesp=1"], cwd=ROOT, env=slurm, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0 and "stesp" in done.stderr + done.stdout, done.stdout + done.stderr
    assert not (Path(slurm["STUBS"]) / "requeued").exists()
