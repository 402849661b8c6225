#!/usr/bin/env python
"""A long run whose ranks are killed at random, against the same run left alone: every loss must be the same to the last bit.

    python -m scripts.check.soak [steps=2000] [kill_every=200] [ranks=2] [seed=0] [run=runs/soak] [out=docs/results/soak/cpu.json]

The tiny hybrid on CPU ranks under torchrun. Now and then a random rank is killed (kill -9); training.supervisor alone brings the job back.
Written: steps, kills, restarts, whether losses are equal, checkpoints that were lost, processes that were left behind.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data.files import write_json
from training.config.arguments import parse_arguments, program
from training.supervisor import rank_files

ROOT = Path(__file__).resolve().parents[2]

DEFAULTS: dict[str, Any] = {
    "steps": 2000,
    "kill_every": 200,
    "ranks": 2,
    "seed": 0,
    "run": "runs/soak",
    "out": "docs/results/soak/cpu.json",
    "data": "",  # token shards; made from the demo corpus if not given
}
LOST = ("-m", "training.supervisor", "restarts=1000", "timeout=300", "backoff=0.2", "--")


def job(values: dict[str, Any], name: str, data: str) -> list[str]:
    """The command of one run; `name` is its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(values["ranks"]), "--master_port", port, "train.py"),
        *("experiment=smoke", "model=hybrid", "size=tiny", "size.d_model=32", "train.device=cpu", f"data.path={data}"),
        *(f"run_dir={Path(values['run']) / name}", f"train.steps={values['steps']}", "train.micro_batch=2", "train.log_every=50"),
        *("eval=end", "eval.tokens=256", "checkpoint.every=25", "checkpoint.keep=3"),
    ]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def step_of(ranks: Path) -> int:
    return max((row.get("step") or 0 for _, row in rank_files(ranks)), default=0)


def kill_now_and_then(process: subprocess.Popen[bytes], values: dict[str, Any], ranks: Path) -> int:
    """Kills random ranks until the job is done; returns how often."""
    chance, kills = random.Random(values["seed"]), 0
    following = chance.randint(values["kill_every"] // 2, values["kill_every"] * 3 // 2)
    while process.poll() is None:
        time.sleep(0.02)
        if step_of(ranks) < following:
            continue
        pids = [row["pid"] for _, row in rank_files(ranks) if row.get("pid")]
        if not pids:
            continue
        time.sleep(chance.random() * 0.5)
        try:
            os.kill(chance.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            continue
        kills += 1
        following += chance.randint(values["kill_every"] // 2, values["kill_every"] * 3 // 2)
    return kills


def left_behind(marker: str) -> list[int]:
    """Processes, zombies among them, whose command names the run."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int(entry.name) != os.getpid() and marker in (entry / "cmdline").read_bytes().decode(errors="replace"):
                pids.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return pids


def main(words: list[str]) -> int:
    values = parse_arguments(words, DEFAULTS)
    run, data, environment = Path(values["run"]), values["data"], {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    shutil.rmtree(run, ignore_errors=True)
    if not data:
        data = str(run / "data")
        prepare = ["-m", "data.prepare", "input=demo", f"out={data}", "tokenizer=bpe:512", "limit_docs=4", "valid_fraction=0.3"]
        subprocess.run([sys.executable, *prepare], cwd=ROOT, check=True, env=environment)
    start = time.perf_counter()
    subprocess.run(job(values, "alone", data), cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
    alone = time.perf_counter() - start
    print(f"left alone: {values['steps']} steps in {alone:.0f} s", flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *LOST, *job(values, "killed", data)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    kills = kill_now_and_then(process, values, run / "killed" / "supervisor")
    seconds = time.perf_counter() - start
    left = left_behind(f"run_dir={run / 'killed'}")
    one, other = losses(run / "alone"), losses(run / "killed")
    notes = [json.loads(line) for line in (run / "killed" / "supervisor" / "supervisor.jsonl").read_text().splitlines()]
    saved_steps = [sorted(p.parent.name for p in (run / name / "checkpoints").glob("step-*/COMPLETE.json")) for name in ("alone", "killed")]
    report = {
        "steps": values["steps"],
        "ranks": values["ranks"],
        "kills": kills,
        "restarts": sum("restart" in note["what"] and "from step" in note["what"] for note in notes),
        "exit_status": process.returncode,
        "losses_equal_bit_for_bit": one == other,
        "steps_that_differ": [step for step in one if one[step] != other.get(step)][:20],
        "final_loss": [one[max(one)], other[max(other)]],
        "checkpoints_equal": saved_steps[0] == saved_steps[1],
        "checkpoints": saved_steps[1],
        "processes_left": left,
        "seconds": {"alone": alone, "killed": seconds},
    }
    write_json(Path(values["out"]), report)
    print(json.dumps(report, indent=1))
    return 0 if one == other and saved_steps[0] == saved_steps[1] and not left and process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
