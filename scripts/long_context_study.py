"""A bounded study of state collapse: small models trained on one corpus, looked at far beyond their training length.

    python -m data.prepare input=CORPUS out=runs/data/study tokenizer=bpe:4096 valid_fraction=0.03
    python scripts/long_context_study.py data=runs/data/study out=runs/study [minutes=8] [tokens=1e8] [together=6] [gpus=0] [only=PART,PART]
        [layers=8] [width=256] [lr=2e-3] [tokens_per_step=16384] [cures=true] [million=true] [seed=0] [device=auto] [toy=true]

The arms are in evals/study.py: Mamba-2 with two state sizes x two training lengths, with state passing from scratch and at the end, a ladder of
harder settings (longer memories at the start, a shorter training length), a parallel GRU and a hybrid. Each arm is a process (`together` of
them on each of the `gpus`; 0: all there are) that trains for `tokens`, or for its share of `minutes` if that is less, saves a checkpoint
and evaluates it with the suites of evals/ (position curve, states, remembrance, passkey, cures). Position curves of 2^20 tokens through untrained
models, with peak memory at 2^16 and 2^20, come first. Every result is JSON as soon as it is there; table.md, table.json, study.png and
evals/report.html at the end. What is there already is not done again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evals.figures import pyplot  # noqa: E402
from evals.report import cell, markdown_table, write_report  # noqa: E402
from evals.study import ARMS, measure, train  # noqa: E402
from training.arguments import parse_arguments, program  # noqa: E402
from training.files import write_json  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "data": "runs/data/study",
    "out": "runs/study",
    "minutes": 8.0,
    "tokens": 1e8,  # of an arm
    "train_seconds": 0.0,  # at most, of an arm; 0: its share of `minutes`
    "together": 6,
    "gpus": 0,
    "only": "",
    "toy": False,
    "device": "auto",
    "arm": "",  # a worker's
    "cures": True,
    "million": True,
    "seed": 0,
    "precision": "bf16",
    "layers": 8,
    "width": 256,
    "tokens_per_step": 16384,
    "lr": 2e-3,
}
MILLION: dict[str, tuple[dict[str, Any], int]] = {  # mixer and layers of width 384, with an embedding of 32,768
    "mamba2-20m": ({"type": "mamba2", "d_state": 64}, 8),
    "mamba2-35m": ({"type": "mamba2", "d_state": 64}, 22),
    "paragru-35m": ({"type": "rnn", "cell": "paragru", "n_heads": 4}, 12),
}
MEASURING = 45.0  # seconds kept for the last arms' evaluation


def million(values: dict[str, Any], device: str) -> None:
    """Position curve of 2^20 tokens through untrained models: time, and peak memory at two lengths."""
    import numpy as np
    import torch

    from data.shards import ShardSet
    from evals.adapters import ItemError, OwnAdapter
    from evals.position import position_curve
    from models.config import ModelConfig
    from models.lm import LanguageModel
    from training.metrics import environment

    toy, path = values["toy"], Path(values["out"]) / "million.json"
    shards = ShardSet(values["data"], "train")
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, (mixer, layers) in MILLION.items():
        config = ModelConfig.from_dict(
            {
                "vocab_size": -(-shards.vocab_size // 64) * 64 if toy else 32768,
                "d_model": 64 if toy else 384,
                "n_layers": 2 if toy else layers,
                "pattern": ["x"],
                "mixers": {"x": mixer},
                "d_ff": 0 if mixer["type"] == "mamba2" else -1,
                "tie_embeddings": True,
            }
        )
        model = LanguageModel(config)
        model.init_weights(0)
        adapter = OwnAdapter(model.to(device), None, name, name, "bf16" if device.startswith("cuda") else "fp32")
        for length in (2048, 8192) if toy else (1 << 16, 1 << 20):
            key = f"{name}-{length}"
            if "seconds" in results.get(key, {}):
                continue
            ids = np.arange(length + 1) % min(shards.n_tokens, length + 1)
            tokens = np.asarray(shards.read(0, min(shards.n_tokens, length + 1)))[ids].astype(np.int64)[None]
            try:
                result = position_curve(adapter, tokens, chunk=1024 if toy else 16384)
            except (ItemError, torch.OutOfMemoryError) as error:
                result = {"failed": str(error).split("\n")[0]}
            parameters = sum(p.numel() for p in model.parameters())
            results[key] = {**result, "parameters": parameters, "environment": environment(torch.device(device))}
            write_json(path, results)
            speed, peak = result.get("tokens_per_second", float("nan")), result.get("peak_memory_bytes") or 0
            print(
                f"{key}: {parameters:,} parameters, {result.get('seconds', float('nan')):.1f} s, {speed:,.0f} tokens/s, peak {peak:,} bytes {result.get('failed', '')}",
                flush=True,
            )


def table(out: Path) -> str:
    """table.json and table.md from what lies there; the latter's text."""
    rows = []
    for name in ARMS:
        path = out / "arms" / name / "train.json"
        if not path.exists():
            continue
        arm = json.loads(path.read_text())
        row = {k: arm[k] for k in ("arm", "T", "parameters", "state_elements", "tokens", "loss")}
        items = {p.stem: json.loads(p.read_text()) for p in (out / "evals" / arm["arm"] / "items").glob("*.json")}
        if (p := items.get("position-prose", {})).get("status") == "done":
            c = p["result"]["collapse"]
            row |= {"inside": c.get("level_inside"), "delta": c.get("delta_at_end"), "largest": c.get("delta_largest"), "longest": c.get("longest")}
            row |= {"onset 0.1": c.get("onset_0.1"), "onset 0.5": c.get("onset_0.5"), "passes 2x": c.get("forgets_2x"), "verdict": c.get("verdict")}
        if (s := items.get("states-prose", {})).get("status") == "done" and s["result"]["growth"]:
            ratios = sorted(g["variance_ratio"] for g in s["result"]["growth"])
            row |= {"median growth": ratios[len(ratios) // 2], "largest growth": ratios[-1]}
        if (r := items.get("remembrance", {})).get("status") == "done":
            row["EffRem at 1/8"] = next((x["distance"] for x in r["result"]["curve"] if x["dropped"] * 8 >= r["result"]["length"]), None)
        rows.append(row)
    write_json(out / "table.json", rows)
    columns = list(dict.fromkeys(k for row in rows for k in row))
    text = markdown_table(columns, [[cell(row.get(c)) for c in columns] for row in rows])
    (out / "table.md").write_text(text + "\n")
    return text


def plot(out: Path) -> None:
    """study.png: rise of the loss over position in training lengths, an arm a line, and how it came about in training."""
    plt = pyplot()
    arms = [json.loads(p.read_text()) for name in ARMS if (p := out / "arms" / name / "train.json").exists()]
    if plt is None or not arms:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for i, arm in enumerate(arms):
        style = {"color": plt.get_cmap("tab20")(i % 20), "label": arm["arm"], "linestyle": "--" if "pass" in arm["arm"] else "-"}
        path = out / "evals" / arm["arm"] / "items" / "position-prose.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("status") == "done":
            result = record["result"]
            x = [(b["from"] * b["to"]) ** 0.5 / arm["T"] for b in result["buckets"] if b["from"] >= arm["T"]]
            left.plot(x, result["collapse"]["delta"], marker=".", markersize=4, **style)
        grown = [(h["tokens"] / 1e6, h["collapse"]["delta_at_end"]) for h in arm["history"] if "delta_at_end" in h.get("collapse", {})]
        if len(grown) > 1:
            right.plot(*zip(*grown), marker=".", **style)
    left.set(xscale="log", xlabel="position / training length", ylabel="nats above the same tokens in windows of T", title="Held-out text")
    right.set(xlabel="million tokens trained on", ylabel="rise at 64 training lengths, nats", title="In the course of training")
    for axes in (left, right):
        axes.axhline(0.1, color="grey", linewidth=0.8, linestyle=":")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "study.png", dpi=110)
    plt.close(figure)


def start_arm(name: str, values: dict[str, Any], seconds: float, gpu: int) -> subprocess.Popen[bytes]:
    """A worker process for one arm on one GPU."""
    given = values | {"train_seconds": round(seconds, 1), "arm": name}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    seen = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    if values["device"] == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = seen[gpu] if seen else str(gpu)
    return subprocess.Popen([sys.executable, __file__, *(f"{k}={v}" for k, v in given.items())], env=environment)


def run_arms(values: dict[str, Any], gpus: int, start: float) -> list[str]:
    """Trains and measures all arms that are not there yet, so many at a time; the names of those that failed."""
    out, slots = Path(values["out"]), values["together"] * gpus
    waiting = [name for name in ARMS if any(part in name for part in values["only"].split(","))]
    running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
    failed: list[str] = []

    def ready(name: str) -> bool:
        base = ARMS[name].get("from")
        return base is None or (out / "arms" / base / "train.json").exists()

    while waiting or running:
        while len(running) < slots and (name := next((n for n in waiting if ready(n)), "")):
            left = 60 * values["minutes"] - (time.perf_counter() - start) - MEASURING
            seconds = values["train_seconds"] or max(5.0, left * min(1.0, slots / max(1, len(waiting) + len(running))))
            waiting.remove(name)
            used = [gpu for gpu, _ in running.values()]
            gpu = min(range(gpus), key=used.count)
            running[name] = (gpu, start_arm(name, values, seconds, gpu))
        if not running:  # what is left waits for arms that failed
            failed += waiting
            break
        time.sleep(0.2)
        for name in [n for n, (_, p) in running.items() if p.poll() is not None]:
            status = running.pop(name)[1].returncode
            print(f"[{time.perf_counter() - start:.0f} s] {name} ended with status {status}", flush=True)
            failed += [name] if status else []
            table(out)
    return failed


def main(words: list[str]) -> int:
    """What the command line asks for; returns the exit status. Raises UserError."""
    values = parse_arguments(words, DEFAULTS)
    import torch

    device = torch.device("cuda" if values["device"] in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    values["device"], out, start = device.type, Path(values["out"]), time.perf_counter()
    if values["arm"]:  # a worker
        if not (out / "arms" / values["arm"] / "train.json").exists():
            train(values["arm"], values, device)
        measure(values["arm"], values, device)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if values["million"]:
        million(values, device.type)
    gpus = (values["gpus"] or torch.cuda.device_count()) if device.type == "cuda" else 1
    failed = run_arms(values, gpus, start)
    write_report(out / "evals")
    print(table(out), flush=True)
    plot(out)
    write_json(out / "study.json", {"seconds": time.perf_counter() - start, "failed": failed, "settings": values, "gpus": gpus})
    print(
        f"done in {time.perf_counter() - start:.0f} s; failed: {failed or 'none'}; {out}/table.md, {out}/evals/report.html, {out}/million.json"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
