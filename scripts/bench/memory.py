"""Trains a few steps of each config by train.py itself and puts measured peak memory beside the estimate of dry_run, with tokens/s.

    python -m scripts.bench.memory out=docs/results/zero/h100.json data=runs/data/demo         one GPU of 80 GB and 128 GB of main memory
    python -m scripts.bench.memory out=FILE data=DIR set=400m only=mamba2 budget=120 steps=4

Sets: 1b (a transformer of 1.4B under each ZeRO stage and offload), 400m (the estimate for each kind of model), all. Every run is a process of its
own with a time limit; rows are written as they come, and `budget` seconds end the whole. `peak_gib` is torch's high-water mark of allocated memory.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from data.files import check_writable, write_json
from training.config.arguments import program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 200  # seconds of one run
COMMON = [
    "train.precision=bf16", "train.seq_len=2048", "model.vocab_size=50432", "eval=end", "eval.tokens=2048", "eval.sample_tokens=1",
    "checkpoint.at_end=false", "train.log_every=1", "train.resume=none",
]  # fmt: skip
BIG = ["model=transformer", "size=1b", "train.micro_batch=4"]
SETS: dict[str, dict[str, list[str]]] = {
    "400m": {
        f"400m {model}": [f"model={model}", "size=400m", "train.micro_batch=2", "train.global_batch=2"]
        for model in ("transformer", "mamba2", "paragru", "hybrid")
    },
    "1b": {
        "1b zero1": [*BIG, "train.global_batch=4", "deepspeed=zero1"],
        "1b zero2": [*BIG, "train.global_batch=4", "deepspeed=zero2"],
        "1b zero3": [*BIG, "train.global_batch=4", "deepspeed=zero3"],
        "1b zero2, optimizer on the host": [*BIG, "train.global_batch=4", "deepspeed=zero2", "deepspeed.offload_optimizer=cpu"],
        "1b zero3, all on the host": [*BIG, "train.global_batch=4", "deepspeed=zero3_offload"],
        "1b zero1, accumulation, checkpointing": [*BIG, "train.global_batch=8", "train.activation_checkpointing=full", "deepspeed=zero1"],
    },
}


def settings(words: list[str]) -> dict[str, str]:
    options = {"out": "", "data": "", "set": "all", "only": "", "budget": "600", "steps": "4"}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in options or not equals:
            raise UserError(f"Cannot use {word!r}; the options are {', '.join(f'{k}=' for k in options)}.")
        options[key] = value
    if not options["out"] or not options["data"] or options["set"] not in (*SETS, "all"):
        raise UserError(f"Give out=FILE, data=DIR of token shards, and set= one of {', '.join(SETS)}, all.")
    return options


def expected(overrides: list[str]) -> dict[str, Any]:
    """What dry_run would say of one rank, in GiB."""
    from training.config.cli import checked, compose_config
    from training.cost.flops import meta_model
    from training.cost.memory import GIB, activations, estimate
    from training.setup import model_config

    config = checked(compose_config(overrides))
    shape, _ = model_config(config, None)
    model = meta_model(shape)
    forecast = estimate(config, model, activations(config, shape), 1)
    phases = {"forward": forecast.forward, "backward": forecast.backward, "update": forecast.update}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "estimate_gib": forecast.peak / GIB,
        "estimate_by_phase": {k: v / GIB for k, v in phases.items()},
    }


def measured(overrides: list[str], run_dir: Path, limit: float) -> dict[str, Any]:
    """Runs train.py. Peak memory and the median speed of the steps after the second, or why there are none."""
    began = time.monotonic()
    try:
        command = [sys.executable, "train.py", *overrides, f"run_dir={run_dir}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        status, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        status, text = -1, f"no end within {limit:.0f} s\n{(error.stdout or b'')[-500:]!r}"
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    rows = [row for row in rows if "loss" in row]
    report: dict[str, Any] = {"status": status, "wall_s": time.monotonic() - began, "steps": len(rows)}
    if rows:
        later = rows[2:] or rows
        report |= {
            "peak_gib": max(row["memory_gib"] for row in rows),
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in later),
            "mfu": statistics.median(row["mfu"] for row in later) if all(row["mfu"] for row in later) else None,
            "losses": [row["loss"] for row in rows],
        }
    if status:
        report["said"] = text[-1500:]
    return report


def main() -> int:
    options = settings(sys.argv[1:])
    out, end = Path(options["out"]), time.monotonic() + float(options["budget"])
    chosen = {
        name: row for key, rows in SETS.items() if options["set"] in (key, "all") for name, row in rows.items() if options["only"] in name
    }
    check_writable(out.parent)
    rows: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    for name, overrides in chosen.items():
        left = end - time.monotonic()
        if left < 15:
            print(f"{name}: no time left", flush=True)
            continue
        words = [*overrides, *COMMON, f"data.path={Path(options['data']).resolve()}", f"train.steps={options['steps']}"]
        with tempfile.TemporaryDirectory() as folder:
            row = {"name": name, "overrides": words, **expected(words)}
            row |= measured(words, Path(folder) / "run", min(LIMIT, left))
            environment_file = Path(folder) / "run" / "environment.json"
            environment = json.loads(environment_file.read_text()) if environment_file.exists() else environment
        rows.append(row)
        report = {"tools": {tool: shutil.which(tool) for tool in ("gcc", "g++", "nvcc", "ninja")}, "environment": environment, "rows": rows}
        write_json(out, report)
        print(line(row), flush=True)
    return 0 if rows and all(not row["status"] for row in rows) and len(rows) == len(chosen) else 1


def line(row: dict[str, Any]) -> str:
    if "peak_gib" not in row:
        return f"{row['name']:<40} estimate {row['estimate_gib']:6.2f} GiB   failed: {row.get('said', '')[-300:]}"
    ratio = row["estimate_gib"] / row["peak_gib"]
    numbers = f"peak {row['peak_gib']:6.2f} GiB  estimate {row['estimate_gib']:6.2f} ({100 * (ratio - 1):+.1f} %)"
    return f"{row['name']:<40} {numbers}  {row['tokens_per_second']:>8,.0f} tok/s  {row['wall_s']:.0f} s"


if __name__ == "__main__":
    sys.exit(program(__doc__, lambda words: main()))
