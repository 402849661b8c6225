#!/usr/bin/env python
"""Training over several GPUs of one host: scaling under ZeRO, sequence parallelism, equal losses, resuming on fewer GPUs, a killed rank.

    python scripts/bench_multi_gpu.py [gpus=2] [minutes=30] [parts=sequence,zero,resume,kill] [sizes=400m,1b] [out=docs/results/multi_gpu]
    python scripts/bench_multi_gpu.py draw=true [out=...]        # plots and the table, from the rows alone
    python scripts/bench_multi_gpu.py toy=true gpus=2            # the same program in small, on CPU ranks

gpus: how many of the host's; run it for 2, 4 and 8 with the same `out`, each has its own baseline on one GPU in the same call.
    sequence   one mixer layer at T = 131,072 and 1,048,576 cut over the GPUs: compared with one GPU, then time, memory, bytes received;
               then whole 400M models
    zero       ZeRO 1, 2, 3 of four models: tokens/s a GPU, MFU, memory, efficiency against one GPU at the same micro-batch; and the losses
               of a 35M hybrid on the same samples on one GPU and on all
    resume     a run on all GPUs goes on with fewer and another ZeRO stage
    kill       a rank is killed; the supervisor brings the run back
Every row is written to OUT/rows_N.jsonl as soon as it is measured; a part that fails or runs out of time is noted and the next begins.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.arguments import parse_arguments, program  # noqa: E402
from training.errors import UserError  # noqa: E402
from training.files import write_json  # noqa: E402
from training.metrics import environment  # noqa: E402
from training.supervisor import rank_files  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "gpus": 2, "minutes": 30.0, "parts": "sequence,zero,resume,kill", "sizes": "400m,1b", "out": "docs/results/multi_gpu", "draw": False, "toy": False,
}  # fmt: skip
MODELS = ("transformer", "paragru", "mamba2", "hybrid")
LAYERS: dict[str, dict[str, Any]] = {
    "paragru": {"type": "rnn", "cell": "paragru"},
    "mamba2": {"type": "mamba2", "d_state": 64, "chunk": 64},
    "attention": {"type": "attention", "n_heads": 8},
    "paralstm": {"type": "rnn", "cell": "paralstm"},
    "window 4096": {"type": "attention", "n_heads": 8, "window": 4096},
}
MICRO = {"400m": 8, "1b": 4, "tiny": 2}
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "OMP_NUM_THREADS": "4", "WANDB_MODE": "disabled"}


def launcher(ranks: int) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port]


class Bench:
    """What the parts share: the settings, the end of the time, and the file of rows."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.gpus, self.toy, self.sizes = values["gpus"], values["toy"], values["sizes"].split(",")
        self.end = time.monotonic() + 60 * values["minutes"]
        self.out = Path(values["out"])
        self.out.mkdir(parents=True, exist_ok=True)
        self.rows = self.out / f"rows_{self.gpus}.jsonl"
        self.environment = {**ENVIRONMENT, **os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.toy else {})}

    def left(self) -> float:
        return self.end - time.monotonic()

    def add(self, **row: Any) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps({"gpus": self.gpus, **row}) + "\n")
        print(json.dumps(row)[:300], flush=True)

    def run(self, command: list[str], seconds: float) -> tuple[int, str]:
        """(exit status, the end of what it said); status 124: it took longer than `seconds` and was killed with all it started."""
        with tempfile.TemporaryFile("w+") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = 124
            said.seek(0)
            return status, said.read()[-1500:]

    def cases(self, part: str, cases: list[dict[str, Any]], ranks: int, seconds: float) -> None:
        """Runs the cases in one process group; after one that fails the rest goes into a new one."""
        end = time.monotonic() + min(seconds, self.left())
        cases, said = [{"part": part, **case} for case in cases], ""
        while cases and end - time.monotonic() > 20:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "cases.json").write_text(json.dumps(cases))
                worker = ["scripts/multi_gpu_worker.py", f"{folder}/cases.json", f"{folder}/rows.jsonl"]
                status, said = self.run([*launcher(ranks), *worker], end - time.monotonic())
                found = Path(folder) / "rows.jsonl"
                done = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
            for row in done:
                self.add(**row)
            cases = cases[len(done) :]
            if status == 124 or not status:
                break
            self.add(**cases[0], gpus=ranks, error=said)
            cases = cases[1:]
        if cases:
            self.add(part=part, gpus=ranks, not_run=[case["id"] for case in cases], said=said[-500:])


def sequence(bench: Bench) -> None:
    """Short before long, and what is quadratic or plain torch last."""
    N, D = bench.gpus, 32 if bench.toy else 1024
    short, long = (128 * N, 256 * N) if bench.toy else (131072, 1048576)
    layers: dict[tuple[str, int], dict[str, Any]] = {}
    for name, mapping in LAYERS.items():
        if bench.toy:
            mapping = mapping | {"mamba2": {"head_dim": 16, "d_state": 8}, "window 4096": {"window": 16}}.get(name, {})
        for T in (short, long):
            alone = T == short or name not in ("attention", "mamba2")
            check = (64 if bench.toy else 4096) * N if T == short else 0
            layers[name, T] = {"id": f"{name} {T}", "kind": "layer", "mixer": mapping, "D": D, "T": T, "check": check, "alone": alone}
    size = "tiny" if bench.toy else "400m"

    def whole(model: str, T: int) -> dict[str, Any]:
        overrides = [*plain(model, size, 1, T, 1, 1), "train.activation_checkpointing=full"]
        return {"id": f"{model} {size} {T}", "kind": "train", "sequence": N, "steps": 3, "model": model, "overrides": overrides}

    cases = [layers[name, short] for name in LAYERS]
    cases += [layers["paragru", long], whole("paragru", short), layers["mamba2", long], whole("mamba2", short), whole("transformer", short)]
    cases += [
        whole("paragru", long),
        layers["paralstm", long],
        layers["window 4096", long],
        layers["attention", long],
        whole("mamba2", long),
    ]
    bench.cases("sequence", cases, N, 0.32 * bench.left())


def plain(model: str, size: str, stage: int, T: int, micro: int, rows: int) -> list[str]:
    return [
        *(f"model={model}", f"size={size}", f"deepspeed=zero{stage}", "train.precision=bf16", f"train.seq_len={T}"),
        *(f"train.micro_batch={micro}", f"train.global_batch={rows}"),
    ]


def zero(bench: Bench) -> None:
    """One GPU first, then all; the most wanted cases first."""
    sizes, T = (["tiny"], 64) if bench.toy else (bench.sizes, 2048)

    def cases(ranks: int, stages: tuple[int, ...]) -> list[dict[str, Any]]:
        small, rows = "tiny" if bench.toy else "35m", 8
        equal = {
            **{"id": "equal losses", "kind": "train", "init": "own", "steps": 20, "lr": 1e-3, "vocabulary": 4096},
            "overrides": plain("hybrid", small, 1, 64 if bench.toy else 1024, rows // ranks, rows),
        }
        return [equal] + [
            {
                **{"id": f"{model} {size} zero{stage}", "kind": "train", "steps": 8, "model": model, "size": size, "stage": stage},
                "overrides": plain(model, size, stage, T, MICRO[size], MICRO[size] * ranks),
            }
            for stage in stages
            for size in sizes
            for model in MODELS
        ]

    bench.cases("zero", cases(1, (1,)), 1, 0.25 * bench.left())
    bench.cases("zero", cases(bench.gpus, (1, 3, 2)), bench.gpus, 0.4 * bench.left())


def small_run(bench: Bench, name: str, folder: Path, ranks: int, steps: int, *more: str) -> list[str]:
    """A tiny hybrid on the demo text through train.py itself."""
    return [
        *(*launcher(ranks), "train.py", "experiment=smoke", "model=hybrid", f"data.path={folder / 'data'}", f"run_dir={folder / name}"),
        *(
            f"train.steps={steps}",
            "train.global_batch=8",
            "train.micro_batch=1",
            "schedule=constant",
            "schedule.warmup=5",
            "eval=end",
            "eval.tokens=256",
        ),
        *("eval.sample_tokens=1", "train.log_every=100", *more),
    ]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def furthest(one: dict[int, float], other: dict[int, float]) -> float:
    assert one.keys() == other.keys(), (len(one), len(other))
    return max(abs(other[step] - one[step]) / one[step] for step in one)


def prepared(bench: Bench, folder: Path) -> int:
    """Token shards and the run that is left alone, unless they are there; returns its steps."""
    steps = 40 if bench.toy else 200
    if not (folder / "data").exists():
        prepare = ["-m", "data.prepare", "input=demo", f"out={folder / 'data'}", "tokenizer=bpe:512", "limit_docs=4", "valid_fraction=0.3"]
        alone = small_run(bench, "alone", folder, bench.gpus, steps, "deepspeed=zero2", f"checkpoint.milestones=[{steps // 2}]")
        for command in ([sys.executable, *prepare], alone):
            status, said = bench.run(command, bench.left())
            if status:
                raise RuntimeError(said)
    return steps


def resume(bench: Bench, folder: Path) -> None:
    """From the middle of the run on all GPUs, on a half and a quarter of them, or on one."""
    steps = prepared(bench, folder)
    middle = folder / "alone" / "checkpoints" / f"step-{steps // 2:08d}"
    for ranks in [n for n in (4, 2, 1) if n < bench.gpus][:2]:
        moved = small_run(bench, f"on{ranks}", folder, ranks, steps, "deepspeed=zero1", f"train.resume={middle}", "checkpoint.at_end=false")
        status, said = bench.run(moved, bench.left())
        if status:
            raise RuntimeError(said)
        other = losses(folder / f"on{ranks}")
        one = {step: loss for step, loss in losses(folder / "alone").items() if step > steps // 2}
        bench.add(part="resume", id=f"on {ranks}, ZeRO 2 to 1", steps=len(one), largest_relative_difference=furthest(one, other))


def kill(bench: Bench, folder: Path) -> None:
    steps = prepared(bench, folder)
    options = ["restarts=3", "timeout=120", "backoff=0.2"]
    job = small_run(bench, "killed", folder, bench.gpus, steps, "deepspeed=zero2", f"checkpoint.every={steps // 10}")
    command = [sys.executable, "-m", "training.supervisor", *options, "--", *job]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=bench.environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        ranks, kills = folder / "killed" / "supervisor", 0
        while process.poll() is None and bench.left() > 0:
            time.sleep(0.02)
            found = [row for _, row in rank_files(ranks) if row.get("pid")]
            if not kills and max((row.get("step") or 0 for row in found), default=0) >= steps // 3:
                os.kill(random.Random(0).choice(found)["pid"], signal.SIGKILL)
                kills += 1
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        text = said.read()[-1500:]
    if process.wait():
        raise RuntimeError(text)
    notes = [json.loads(line)["what"] for line in (ranks / "supervisor.jsonl").read_text().splitlines()]
    one, other = losses(folder / "alone"), losses(folder / "killed")
    bench.add(part="kill", kills=kills, notes=notes, largest_relative_difference=furthest(one, other), equal_bit_for_bit=one == other)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(out.glob("rows_*.jsonl")) for line in path.read_text().splitlines()]


def summary(out: Path) -> list[str]:
    """The table, and summary.json: each row with its efficiency against one GPU and the largest loss difference."""
    rows, lines, kept = rows_of(out), [], []
    alone = {(row["model"], row["size"]): row for row in rows if row.get("stage") == 1 and row["gpus"] == 1 and "losses" in row}
    equal = [row for row in rows if row.get("id") == "equal losses" and "losses" in row]
    for row in rows:
        short = {key: value for key, value in row.items() if key not in ("losses", "samples", "overrides", "kind")}
        if "error" in row or "not_run" in row:
            text = f"not measured: {str(row.get('error', '')).splitlines()[-1:] or row.get('not_run')}"
        elif "stage" in row:
            one = alone.get((row["model"], row["size"]))
            short["efficiency"] = row["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"] if one else None
            mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} % MFU  "
            share = "" if short["efficiency"] is None else f"efficiency {short['efficiency']:.3f}"
            text = f"{row['tokens_per_second_per_gpu']:>9,.0f} tokens/s a GPU  {mfu}{row['memory_gib']:.1f} GiB  {share}"
        elif row.get("id") == "equal losses" and "losses" in row:
            short["largest_relative_difference"] = max(abs(a - b) / b for a, b in zip(row["losses"], equal[0]["losses"]))
            short["same_samples"] = row["samples"] == equal[0]["samples"]
            text = f"losses differ by {short['largest_relative_difference']:.1e} from one GPU's, same samples: {short['same_samples']}"
        elif row["part"] == "sequence":
            seconds, received = row.get("seconds", row.get("step_seconds")), sum(row["received_bytes"].values())
            right = f"correct: {row['correct']}  " if "correct" in row else ""
            faster = f"{row['speedup']:.2f}x one GPU  " if "speedup" in row else ""
            text = f"{right}{1e3 * seconds:,.1f} ms  {faster}{row['memory_gib']:.1f} GiB  {received:,} bytes received"
        else:
            text = f"losses differ by {row['largest_relative_difference']:.1e} from the run left alone"
        kept.append(short)
        lines.append(f"{row['gpus']} x {row['part']:<9}{row.get('id', ''):<28}{text}")
    write_json(out / "summary.json", kept)
    return lines


def draw(out: Path) -> None:
    """efficiency.png and sequence.png beside the rows."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("No plots: matplotlib is not installed (pip install matplotlib, then draw=true).")
        return
    rows = json.loads((out / "summary.json").read_text())
    for name, chosen, value, label in (
        ("efficiency", [r for r in rows if r.get("efficiency") and r["gpus"] > 1], "efficiency", "tokens/s a GPU, share of one GPU's"),
        ("sequence", [r for r in rows if r.get("speedup")], "speedup", "speed of a layer against one GPU"),
    ):
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(8, 0.35 * len(chosen) + 1.5))
        axes.barh([f"{r['id']}, {r['gpus']} GPUs" for r in chosen], [r[value] for r in chosen])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)


def main(words: list[str]) -> int:
    values = parse_arguments(words, DEFAULTS)
    if not values["draw"]:
        bench, folder = Bench(values), Path(tempfile.mkdtemp(prefix="everywhen-multi-gpu-"))
        parts = {
            "sequence": lambda: sequence(bench),
            "zero": lambda: zero(bench),
            "resume": lambda: resume(bench, folder),
            "kill": lambda: kill(bench, folder),
        }
        unknown = [part for part in values["parts"].split(",") if part not in parts]
        if unknown:
            raise UserError(f"There is no part {unknown[0]!r}; choose of {','.join(parts)}.")
        bench.rows.unlink(missing_ok=True)
        write_json(bench.out / f"environment_{bench.gpus}.json", environment(torch.device("cpu" if bench.toy else "cuda")))
        for part in values["parts"].split(","):
            if bench.left() < 20:
                bench.add(part=part, not_run=["no time left"])
                continue
            try:
                parts[part]()
            except (RuntimeError, OSError, AssertionError) as error:  # the other parts do not depend on it
                bench.add(part=part, error=str(error))
    print("\n".join(summary(Path(values["out"]))))
    draw(Path(values["out"]))
    return 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
