"""A bounded study of state collapse: small models trained on one corpus, looked at far beyond their training length.

    python -m data.prepare input=CORPUS out=runs/data/study tokenizer=bpe:4096 valid_fraction=0.02
    python scripts/long_context_study.py data=runs/data/study out=runs/study [train_seconds=100] [together=4] [dt_max=0.1] [only=PART] [toy=true] [device=auto] [cures=true]

Arms: Mamba-2 with two state sizes x two training lengths, one of them with state passing, a parallel GRU and a hybrid. Each arm is a process
(`together` of them at a time on the device) that trains for at most `train_seconds`, saves a checkpoint and evaluates it with the suites of
evals/ (position curve, states, remembrance, passkey). Then a position curve of 2^20 tokens goes through an untrained 35M Mamba-2 and ParaGRU,
with peak memory at 2^16 and 2^20. Every result is JSON as soon as it is there; table.md, table.json and evals/report.html at the end. What is
there already is not done again.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evals.report import cell, markdown_table, write_report  # noqa: E402
from training.arguments import parse_arguments, program  # noqa: E402
from training.files import write_json  # noqa: E402

DEFAULTS: dict[str, Any] = {
    "data": "runs/data/study",
    "out": "runs/study",
    "train_seconds": 100.0,
    "together": 4,
    "only": "",
    "toy": False,
    "device": "auto",
    "arm": "",
    "cures": True,
    "seed": 0,
    "precision": "bf16",
    "tokens_per_step": 32768,
    "steps": 3000,
    "lr": 2e-3,
    "dt_max": 0.1,  # smaller: Mamba-2 starts with longer memories
}
SHORT, LONG = 128, 1024
ARMS: dict[str, dict[str, Any]] = {
    "mamba2-n256-t128": {"pattern": ["m"], "N": 256, "T": SHORT},
    "mamba2-n256-t128-pass": {"pattern": ["m"], "N": 256, "T": SHORT, "initial": "pass"},
    "mamba2-n32-t128": {"pattern": ["m"], "N": 32, "T": SHORT},
    "mamba2-n256-t1024": {"pattern": ["m"], "N": 256, "T": LONG},
    "mamba2-n32-t1024": {"pattern": ["m"], "N": 32, "T": LONG},
    "paragru-t128": {"pattern": ["g"], "N": 0, "T": SHORT},
    "hybrid-t128": {"pattern": ["g", "m", "g", "a"], "N": 64, "T": SHORT},
}


def model_config(arm: dict[str, Any], vocab_size: int, toy: bool, dt_max: float) -> dict[str, Any]:
    d, layers = (64, 2) if toy else (256, 6)
    mixers = {
        "m": {
            "type": "mamba2",
            "d_state": min(arm["N"], 16) if toy else arm["N"],
            "head_dim": 32 if toy else 64,
            "chunk": 64,
            "dt_max": dt_max,
        },
        "g": {"type": "rnn", "cell": "paragru", "n_heads": 4},
        "a": {"type": "attention", "n_heads": 4},
    }
    pattern = arm["pattern"]
    if len(pattern) > 1:
        layers = len(pattern)
    return {
        "vocab_size": -(-vocab_size // 64) * 64,
        "d_model": d,
        "n_layers": layers,
        "pattern": pattern,
        "mixers": {name: mixers[name] for name in dict.fromkeys(pattern)},
        "d_ff": 0 if pattern == ["m"] else -1,
        "tie_embeddings": True,
    }


def train(name: str, values: dict[str, Any], device: str) -> None:
    """Trains one arm and saves its weights; progress and figures in train.json."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from data.shards import ShardSet
    from models.config import ModelConfig
    from models.lm import LanguageModel
    from training.initial_state import InitialStates
    from training.optim import build_optimizer
    from training.schedule import lr_factor

    arm, toy, seed = ARMS[name], values["toy"], values["seed"]
    folder = Path(values["out"]) / "arms" / name
    T = arm["T"] // 4 if toy else arm["T"]
    shards = ShardSet(values["data"], "train")
    config = model_config(arm, shards.vocab_size, toy, values["dt_max"])
    model = LanguageModel(ModelConfig.from_dict(config))
    model.init_weights(seed)
    model = model.to(device).train()
    optimizer = build_optimizer(model, lr=values["lr"], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    rows, limit, steps = max(1, values["tokens_per_step"] // T), values["train_seconds"], values["steps"]
    initial = InitialStates(arm.get("initial", "zero"), seed=seed)
    rng, log, start, step = np.random.default_rng([seed, T]), [], time.perf_counter(), 0
    progress = 0.0
    bf16 = values["precision"] == "bf16" and device.startswith("cuda")
    while progress < 1:
        # One tokenised stream with end-of-text marks and no resets, as the evaluations feed it.
        tokens, _ = shards.rows(rng.integers(0, shards.n_tokens - T - 1, rows), T + 1)
        ids = torch.from_numpy(tokens).to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = values["lr"] * lr_factor(round(progress * 10_000), 10_000, kind="wsd", warmup=300, decay=2000, final=0.0)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
            output = model(ids[:, :-1], labels=ids[:, 1:], state=initial.before(model, 0, rows))
        loss = output.loss_sum / output.token_count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if output.state is not None:
            initial.after(0, output.state)
        step += 1
        seconds = time.perf_counter() - start
        progress = max(step / steps, seconds / limit)
        if step in (1, 10) or step % 100 == 0 or progress >= 1:
            log.append(
                {"step": step, "loss": float(loss.detach()), "gradient_norm": float(norm), "seconds": seconds, "tokens": step * rows * T}
            )
            print(
                f"{name}: step {step}, {log[-1]['tokens']:,} tokens, loss {log[-1]['loss']:.4f}, {step * rows * T / seconds:,.0f} tokens/s",
                flush=True,
            )
            if not math.isfinite(log[-1]["loss"]):
                break
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().float().cpu().contiguous() for k, v in dict(model.named_parameters()).items()}, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_text(shards.tokenizer().to_str())
    write_json(folder / "run.json", {"train": {"seq_len": T}, "data": {"path": values["data"]}})
    state = sum(b.mixer.state_bytes(1) // 4 for b in model.blocks if not hasattr(b.mixer, "q_proj"))  # type: ignore[operator, union-attr]
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    write_json(
        folder / "train.json",
        {
            "arm": name,
            **arm,
            "T": T,
            "parameters": sum(p.numel() for p in model.parameters()),
            "state_elements_about": state,
            "tokens": step * rows * T,
            "steps": step,
            "loss": log[-1]["loss"],
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": peak,
            "data_fingerprint": shards.fingerprint,
            "settings": values,
            "log": log,
        },
    )


def measure(name: str, values: dict[str, Any], device: str) -> None:
    """The suites' items on a trained arm."""
    from evals.suites import Settings, evaluate

    folder, toy = Path(values["out"]) / "arms" / name, values["toy"]
    T = json.loads((folder / "run.json").read_text())["train"]["seq_len"]
    longest = 32 * T if toy else (32768 if T <= SHORT else 65536)
    common: dict[str, Any] = {
        "train_length": T,
        "max_length": longest,
        "data": values["data"],
        "rows": 2 if toy else 8,
        "chunk": 2048,
        "batch": 8,
    }
    cures = values["cures"] and name == "mamba2-n256-t128"
    out = Path(values["out"]) / "evals"
    only = "position-prose,states-prose,remembrance,passkey-512" + (",cure-" if cures else "")
    settings = Settings(
        suite="long_context", only=only, lengths=[512], samples=10, depths=5, cures="default" if cures else "none", **common
    )
    evaluate([str(folder)], settings, out, values["device"], values["precision"] if device.startswith("cuda") else "fp32")


def million(values: dict[str, Any], device: str) -> None:
    """Position curve of 2^20 tokens through untrained 35M models: time, and peak memory at two lengths."""
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
    lengths = (2048, 8192) if toy else (1 << 16, 1 << 20)
    for name in ("mamba2", "paragru"):
        mixer = {"type": "mamba2", "d_state": 64} if name == "mamba2" else {"type": "rnn", "cell": "paragru", "n_heads": 4}
        config = ModelConfig.from_dict(
            {
                "vocab_size": -(-shards.vocab_size // 64) * 64 if toy else 32768,
                "d_model": 64 if toy else 384,
                "n_layers": 2 if toy else (22 if name == "mamba2" else 12),
                "pattern": ["x"],
                "mixers": {"x": mixer},
                "d_ff": 0 if name == "mamba2" else -1,
                "tie_embeddings": True,
            }
        )
        model = LanguageModel(config)
        model.init_weights(0)
        adapter = OwnAdapter(model.to(device), None, name, name, "bf16" if device.startswith("cuda") else "fp32")
        for length in lengths:
            key = f"{name}-{length}"
            if key in results and "seconds" in results[key]:
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
            print(
                f"{key}: {result.get('seconds', float('nan')):.1f} s, peak {result.get('peak_memory_bytes') or 0:,} bytes {result.get('failed', '')}",
                flush=True,
            )


def table(out: Path) -> None:
    """table.json and table.md from what lies there."""
    rows = []
    for path in sorted((out / "arms").glob("*/train.json")):
        arm = json.loads(path.read_text())
        row = {k: arm[k] for k in ("arm", "T", "parameters", "state_elements_about", "tokens", "loss")}
        items = {p.stem: json.loads(p.read_text()) for p in (out / "evals" / arm["arm"] / "items").glob("*.json")}
        if (p := items.get("position-prose", {})).get("status") == "done":
            c = p["result"]["collapse"]
            row |= {"inside": c.get("level_inside"), "delta": c.get("delta_at_end"), "longest": c.get("longest")}
            row |= {
                "onset 0.1": c.get("onset_0.1"),
                "onset 0.5": c.get("onset_0.5"),
                "passes 2x": c.get("forgets_2x"),
                "verdict": c.get("verdict"),
            }
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
    print(text, flush=True)


def main(words: list[str]) -> int:
    """What the command line asks for; returns the exit status. Raises UserError."""
    values = parse_arguments(words, DEFAULTS)
    import torch

    device = "cuda" if values["device"] in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    out, start = Path(values["out"]), time.perf_counter()
    if values["arm"]:  # a worker
        if not (out / "arms" / values["arm"] / "train.json").exists():
            train(values["arm"], values, device)
        measure(values["arm"], values, device)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    waiting = [name for name in ARMS if values["only"] in name]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    failed = []
    while waiting or running:
        while waiting and len(running) < values["together"]:
            name = waiting.pop(0)
            same = [f"{k}={v}" for k, v in values.items() if k != "arm"]
            running.append((name, subprocess.Popen([sys.executable, __file__, *same, f"arm={name}"], env={**os.environ, "PYTHONPATH": str(ROOT)})))
        time.sleep(0.2)
        for pair in [p for p in running if p[1].poll() is not None]:
            running.remove(pair)
            print(f"[{time.perf_counter() - start:.0f} s] {pair[0]} ended with status {pair[1].returncode}", flush=True)
            failed += [pair[0]] if pair[1].returncode else []
            table(out)
    if not values["only"] or values["only"] in "million":
        million(values, device)
    write_report(out / "evals")
    table(out)
    write_json(out / "study.json", {"seconds": time.perf_counter() - start, "failed": failed, "settings": values})
    print(
        f"done in {time.perf_counter() - start:.0f} s; failed: {failed or 'none'}; {out}/table.md, {out}/evals/report.html, {out}/million.json"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
