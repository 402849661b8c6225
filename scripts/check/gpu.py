"""Checks one training step of a config on a GPU against fp32, then trains some steps and keeps the figures.

    python -m scripts.check.gpu OUT.json model=transformer size=400m train.precision=bf16 train.seq_len=2048 train.micro_batch=8 train.global_batch=16

Loss and gradient norm of the first batch in the config's precision are compared with fp32 (TF32 off); then `python train.py` runs as a
user would run it, and the median tokens/s and MFU of its steps go to OUT.json beside the check, the environment and the command.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from training.config.arguments import program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def first_step(overrides: list[str]) -> dict[str, float]:
    """Loss and gradient norm of the first micro-batch, in fp32 and in the config's precision."""
    import torch

    from data.loader import BatchLoader, build_reader
    from models.lm import LanguageModel
    from training.config.cli import checked, compose_config
    from training.setup import model_config, open_shards

    config = checked(compose_config(overrides))
    shards = open_shards(config.data.path, "train")
    device = torch.device("cuda")
    model = LanguageModel(model_config(config, shards)[0])
    model.init_weights(config.seed)
    model = model.to(device)
    rows = min(2, config.train.micro_batch)
    with BatchLoader(
        build_reader(shards, config.data.reader, config.train.seq_len, config.seed, rows), global_batch=rows, micro_batch=rows
    ) as loader:
        batch = next(iter(loader))[0].to(device)
    result = {}
    for name, low in (("fp32", False), (config.train.precision, config.train.precision == "bf16")):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            output = model(batch.input_ids, labels=batch.labels, segment_ids=batch.segment_ids)
        (output.loss_sum / output.token_count).backward()
        norms = torch._foreach_norm([p.grad for p in model.parameters()])
        result[f"loss_{name}"] = float(output.loss_sum.detach() / output.token_count)
        result[f"grad_norm_{name}"] = float(torch.linalg.vector_norm(torch.stack(list(norms))))
    return result


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".json"):
        raise UserError("Say where the figures go: scripts/check/gpu.py OUT.json model=transformer size=400m")
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    check = first_step(overrides)
    print(json.dumps(check), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["train.py", *overrides, f"run_dir={folder}/run", "checkpoint.at_end=false"]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
        environment = json.loads((Path(folder) / "run/environment.json").read_text())
    steps = [r for r in rows if "loss" in r]
    steady = steps[len(steps) // 2 :]
    report = {
        "command": ["python", *command[: 1 + len(overrides)]],
        "environment": environment,
        "first_step": check,
        "losses": [r["loss"] for r in steps],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steady),
        "mfu": statistics.median(r["mfu"] for r in steady) if steady[0]["mfu"] is not None else None,
        "memory_gib": max(r["memory_gib"] for r in steps),
        "data_wait_share": sum(r["data_wait"] for r in steady) / sum(r["seconds"] + r["data_wait"] for r in steady),
    }
    report["environment"].pop("command", None)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: report[k] for k in ("tokens_per_second", "mfu", "memory_gib", "data_wait_share")}))


if __name__ == "__main__":
    sys.exit(program(__doc__, lambda words: main()))
