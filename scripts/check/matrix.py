"""Trains the same few steps in every combination of ZeRO stage, offload, ranks, accumulation, recomputation and compilation, in fp32 on CPU ranks,
and compares the losses with those of one process of plain torch without DeepSpeed.

    python -m scripts.check.matrix data=runs/data/demo out=docs/results/matrix              writes cpu.json and cpu.md
    python -m scripts.check.matrix data=DIR out=DIR ranks=1 only=offload compile=false

All cells of a number of ranks run in one set of processes. Exit status 1 where a loss differs by more than fp32 rounding (1e-5 relative).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS, TOLERANCE = 4, 4, 1e-5
BASE = [
    "experiment=smoke",
    "train.device=cpu",
    "schedule=constant",
    "schedule.warmup=0",
    "optim.lr=3e-3",
    "train.grad_clip=0.5",
    f"train.global_batch={ROWS}",
]
OFFLOADS = {
    "offload optimizer": ["deepspeed.offload_optimizer=cpu"],
    "offload optimizer and parameters": ["deepspeed.offload_optimizer=cpu", "deepspeed.offload_parameters=cpu"],
}


def cells(ranks: int, compiled: bool) -> dict[str, list[str]]:
    """Name and overrides of every cell for this number of ranks."""
    overrides_of: dict[str, list[str]] = {}
    for stage, accumulation, recompute in itertools.product((0, 1, 2, 3), (1, 2), ("none", "full")):
        words = [
            f"deepspeed=zero{stage}",
            f"train.micro_batch={ROWS // ranks // accumulation}",
            f"train.activation_checkpointing={recompute}",
        ]
        overrides_of[f"zero{stage}, accumulation {accumulation}, recomputation {recompute}"] = words
    for stage, (name, offload), accumulation in itertools.product((1, 2, 3), OFFLOADS.items(), (1, 2)):
        if stage == 3 or "parameters" not in name:
            overrides_of[f"zero{stage}, accumulation {accumulation}, {name}"] = [
                f"deepspeed=zero{stage}", f"train.micro_batch={ROWS // ranks // accumulation}", *offload,
            ]  # fmt: skip
    if ranks > 1:
        overrides_of[f"zero3, accumulation 1, hpz {ranks}"] = [
            "deepspeed=zero3",
            f"train.micro_batch={ROWS // ranks}",
            f"deepspeed.hpz={ranks}",
        ]
        for accumulation in (1, 2):
            overrides_of[f"zero3, accumulation {accumulation}, gathered once a step"] = [
                "deepspeed=zero3", "deepspeed.gather=step", f"train.micro_batch={ROWS // ranks // accumulation}",
            ]  # fmt: skip
    for stage in (0, 1, 2, 3) if compiled else ():
        overrides_of[f"zero{stage}, accumulation 1, compiled"] = [
            f"deepspeed=zero{stage}",
            f"train.micro_batch={ROWS // ranks}",
            "train.compile=true",
        ]
    return overrides_of


def plain(data: str) -> dict[str, list[float]]:
    """The losses and gradient norms that every cell must reproduce: plain torch, one process, one batch a step, no DeepSpeed."""
    import torch

    from data.loader import BatchLoader
    from models.lm import LanguageModel
    from training.config.cli import checked, compose_config
    from training.optim import build_optimizer
    from training.setup import model_config, open_reader, open_sources

    config = checked(compose_config([*BASE, f"data.path={data}", f"train.micro_batch={ROWS}"]))
    shards = open_sources(config, "train")
    model = LanguageModel(model_config(config, shards)[0])
    model.init_weights(config.seed)
    o = config.optim
    optimizer = build_optimizer(model, lr=config.peak_lr, betas=(o.betas[0], o.betas[1]), eps=o.eps, weight_decay=o.weight_decay)
    curves: dict[str, list[float]] = {"losses": [], "norms": []}
    with BatchLoader(open_reader(config, shards), global_batch=ROWS, micro_batch=ROWS) as loader:
        for _, (batch,) in zip(range(STEPS), loader):
            output = model(batch.input_ids, labels=batch.labels, segment_ids=batch.segment_ids)
            tokens = (batch.labels != -100).sum()
            optimizer.zero_grad()
            ((output.loss_sum + output.z_loss_sum) / tokens).backward()
            curves["norms"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.grad_clip)))
            curves["losses"].append(float(output.loss_sum.detach().double() / tokens))
            optimizer.step()
    return curves


def worker(data: str, out: Path, names: list[str], compiled: bool) -> None:
    """One rank: trains every named cell, and rank 0 writes the losses."""
    import torch

    from data.loader import BatchLoader
    from models.lm import LanguageModel
    from training.config.cli import checked, compose_config
    from training.engine import Engine
    from training.setup import model_config, open_reader, open_sources
    from training.world import start_distributed

    world = start_distributed("cpu")
    curves_of: dict[str, Any] = {}
    for name, words in cells(world.size, compiled).items():
        if name not in names:
            continue
        config = checked(compose_config([*BASE, *words, f"data.path={data}"]))
        shards = open_sources(config, "train")
        torch.manual_seed(config.seed)
        model = LanguageModel(model_config(config, shards)[0])
        model.init_weights(config.seed)
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        engine = Engine(model, config, world)
        with BatchLoader(
            open_reader(config, shards),
            global_batch=ROWS,
            micro_batch=config.train.micro_batch,
            replica=world.replica,
            replicas=world.replicas,
        ) as loader:
            results = [engine.step(batches, config.peak_lr) for _, batches in zip(range(STEPS), loader)]
        curves_of[name] = {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}
        engine.destroy()
    if world.main:
        out.write_text(json.dumps(curves_of))
    world.barrier()


def in_processes(ranks: int, data: str, names: list[str], compiled: bool) -> dict[str, Any]:
    """The results of the named cells on `ranks` ranks. Raises RuntimeError when a rank fails."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port, out, names_file = probe.getsockname()[1], Path(folder) / "found.json", Path(folder) / "names.json"
        probe.close()
        names_file.write_text(json.dumps(names))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--master_port",
            str(port),
            "--nproc_per_node",
            str(ranks),
            "-m",
            "scripts.check.matrix",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, "worker", data, str(out), str(names_file), str(compiled)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{ranks} rank(s) failed: {(done.stdout + done.stderr)[-3000:]}")
        return json.loads(out.read_text())


def compare(oracle: dict[str, list[float]], curves_of: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """A row for each cell, with the largest relative difference of its losses and gradient norms from the oracle's."""
    rows = []
    for name, result in curves_of.items():
        difference = {key: max(abs(a / b - 1) for a, b in zip(result[key], oracle[key])) for key in ("losses", "norms")}
        equal = all(d < TOLERANCE for d in difference.values())
        rows.append({"ranks": ranks, "cell": name, "losses": result["losses"], "difference": difference, "equal": equal})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the largest difference of every cell by number of ranks."""
    ranks = sorted({row["ranks"] for row in rows})
    lines = ["| cell | " + " | ".join(f"{n} rank(s): loss, gradient norm" for n in ranks) + " |", "|---|" + "---|" * len(ranks)]
    for name in dict.fromkeys(row["cell"] for row in rows):
        shown = []
        for n in ranks:
            row = next((r for r in rows if r["cell"] == name and r["ranks"] == n), None)
            shown.append(
                ""
                if row is None
                else f"{row['difference']['losses']:.1e}, {row['difference']['norms']:.1e}{'' if row['equal'] else ' **differs**'}"
            )
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def write(folder: str, oracle: dict[str, list[float]], rows: list[dict[str, Any]]) -> None:
    """cpu.json and cpu.md, if a folder is named; rows of other cells that are there already stay where the oracle is the same."""
    if not folder:
        return
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    before = json.loads((out / "cpu.json").read_text()) if (out / "cpu.json").exists() else {}
    if before.get("plain_torch") == oracle:
        mine = {(row["ranks"], row["cell"]) for row in rows}
        rows = [row for row in before["rows"] if (row["ranks"], row["cell"]) not in mine] + rows
    (out / "cpu.json").write_text(
        json.dumps({"command": "python -m scripts.check.matrix", "plain_torch": oracle, "rows": rows}, indent=1) + "\n"
    )
    head = (
        f"Largest relative difference from plain torch in one process over {STEPS} steps of the smoke hybrid, fp32, CPU ranks (gloo).\n\n"
    )
    (out / "cpu.md").write_text(f"{head}{table(rows)}\n")


DEFAULTS: dict[str, Any] = {"data": "", "out": "", "ranks": "1,2", "only": "", "compile": True}


def main(words: list[str]) -> int:
    if words[:1] == ["worker"]:
        worker(words[1], Path(words[2]), json.loads(Path(words[3]).read_text()), words[4] == "True")
        return 0
    options = parse_arguments(words, DEFAULTS)
    if not options["data"]:
        raise UserError("Give data=DIR, a folder of token shards (python -m data.prepare input=demo out=DIR).")
    compiled = options["compile"]
    if compiled and not shutil.which(os.environ.get("CXX", "c++")):
        print("There is no C++ compiler, which torch.compile needs on a CPU; its cells are left out.", file=sys.stderr)
        compiled = False
    data, rows = str(Path(options["data"]).resolve()), []
    oracle = plain(data)
    for ranks in map(int, options["ranks"].split(",")):
        names = [name for name in cells(ranks, compiled) if options["only"] in name]
        for some in ([n for n in names if "compiled" not in n], [n for n in names if "compiled" in n]):  # the quick ones first
            rows += compare(oracle, in_processes(ranks, data, some, compiled), ranks) if some else []
            write(options["out"], oracle, rows)
    print(table(rows))
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(program(__doc__, main, sys.argv[1:]))
