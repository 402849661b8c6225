"""How long a text a model can read: time and peak memory by length, and the position curve of a million tokens.

    python -m scripts.bench.long_context                                             # on a GPU: all three models to 1,048,576 tokens
    python -m scripts.bench.long_context device=cpu lengths=2048,8192 models=mamba2-20m width=64 chunk=1024     # the same, small
    python -m scripts.bench.long_context checkpoint=runs/mine text=BOOK.txt          # a trained model's curve instead of untrained ones

Keys (default): models (mamba2-20m,mamba2-35m,paragru-35m), lengths (16384,65536,262144,1048576), chunk (16384), rows (1), per_octave (2), width (384),
seed (0), precision (bf16 on a GPU), device (auto), out (docs/results/long_context/million.json), checkpoint and text or data (see evals.run).

Each length is one pass with carried state, with a peak-memory count of its own; untrained models read random ids. The first length is run twice, so
that compiling is not timed. The result says for each model whether the peak grew with the length (on a CPU there is only the process's largest
size so far, which is no answer), and is written after every pass; what is there already is not done again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from data.fields import nearest
from data.files import write_json
from training.config.arguments import parse_arguments, program
from training.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# mixer and layers; with width 384 and an embedding of 32,768 they have 20M and 35M parameters
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "mamba2-20m": ({"type": "mamba2", "d_state": 64}, 8),
    "mamba2-35m": ({"type": "mamba2", "d_state": 64}, 22),
    "paragru-35m": ({"type": "rnn", "cell": "paragru", "n_heads": 4}, 12),
}
VOCABULARY = 32768
DEFAULTS: dict[str, Any] = {
    "models": ",".join(MODELS),
    "lengths": [],
    "chunk": 16384,
    "rows": 1,
    "per_octave": 2,
    "width": 384,
    "seed": 0,
    "precision": "",
    "device": "auto",
    "out": "docs/results/long_context/million.json",
    "checkpoint": "",
    "text": None,
    "data": None,
    "trust_remote_code": False,
}
SAME = 0.01  # a peak may differ by this share of the shortest length's and count as equal


def untrained(name: str, values: dict[str, Any], device: Any) -> Any:
    """The adapter of a model with random weights."""
    from evals.adapters.own import OwnAdapter
    from models.config import ModelConfig
    from models.lm import LanguageModel

    mixer, layers = MODELS[name]
    model = LanguageModel(
        ModelConfig.from_dict(
            {
                "vocab_size": VOCABULARY,
                "d_model": values["width"],
                "n_layers": layers,
                "pattern": ["x"],
                "mixers": {"x": mixer},
                "d_ff": 0 if mixer["type"] == "mamba2" else -1,
                "tie_embeddings": True,
            }
        )
    )
    model.init_weights(values["seed"])
    return OwnAdapter(model.to(device), None, name, name, values["precision"])


def peak(device: Any) -> int:
    """Bytes: allocated on the GPU since the last reset; on a CPU the process's largest resident size so far, which only grows."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(adapter: Any, ids: Any, values: dict[str, Any]) -> dict[str, Any]:
    """One pass: the position curve, time and peak memory, or {'failed': one sentence}."""
    import torch

    from evals.adapters.base import ItemError
    from evals.measures.position import position_curve

    try:
        curve = position_curve(
            adapter, ids, chunk=values["chunk"], batch=values["rows"], per_octave=values["per_octave"], seed=values["seed"]
        )
    except (ItemError, torch.OutOfMemoryError) as error:
        return {"length": ids.shape[1] - 1, "failed": str(error).split("\n")[0]}
    return {**curve, "peak_memory_bytes": peak(adapter.device)}


def verdict(passes: dict[str, dict[str, Any]], cuda: bool) -> dict[str, Any]:
    """How much one model's peak memory grows from the shortest to the longest length, and whether the growth counts as none."""
    rows = sorted((p for p in passes.values() if "peak_memory_bytes" in p), key=lambda p: p["length"])
    if len(rows) < 2:
        return {"memory_independent_of_length": None}
    growth = rows[-1]["peak_memory_bytes"] / rows[0]["peak_memory_bytes"] - 1
    return {
        "from": rows[0]["length"],
        "to": rows[-1]["length"],
        "peak_growth": growth,
        "memory_independent_of_length": abs(growth) <= SAME if cuda else None,
        "seconds_of_the_longest": rows[-1]["seconds"],
    }


def settle(values: dict[str, Any]) -> list[str]:
    """Replaces defaults that depend on the machine, in place; returns the names of the models to measure. Raises UserError."""
    import torch

    if values["device"] not in ("auto", "cpu", "cuda") or values["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={values['device']}: choose auto, cpu or, where PyTorch sees a GPU, cuda.")
    values["device"] = "cuda" if torch.cuda.is_available() and values["device"] != "cpu" else "cpu"
    values["precision"] = values["precision"] or ("bf16" if values["device"] == "cuda" else "fp32")
    values["lengths"] = sorted(values["lengths"]) or [1 << 14, 1 << 16, 1 << 18, 1 << 20]
    if values["checkpoint"]:
        return [Path(values["checkpoint"]).resolve().name]
    names = [name for name in values["models"].split(",") if name]
    if unknown := [name for name in names if name not in MODELS]:
        raise UserError([f"There is no model {name!r}; {nearest(name, list(MODELS))}" for name in unknown])
    return names


def main(words: list[str]) -> None:
    """Measures every model at every length that OUT does not have yet. Raises UserError."""
    values = parse_arguments(words, DEFAULTS)
    names = settle(values)
    import numpy as np
    import torch

    from evals.adapters.base import ItemError
    from evals.adapters.load import load_adapter
    from evals.inputs.texts import open_text
    from training.watch.metrics import environment

    device, out = torch.device(values["device"]), Path(values["out"])
    settings = {key: values[key] for key in ("chunk", "rows", "width", "seed", "precision", "device", "checkpoint", "text", "data")}
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "models": {}}
    for name in names:
        record = result["models"].setdefault(name, {"passes": {}})
        todo = [n for n in values["lengths"] if "seconds" not in record["passes"].get(str(n), {})]
        if not todo:
            print(f"{name}: there already", flush=True)
            continue
        adapter = (
            load_adapter(values["checkpoint"], device, values["precision"], None, values["trust_remote_code"])
            if values["checkpoint"]
            else untrained(name, values, device)
        )
        text = open_text(adapter, values["data"], values["text"]) if values["checkpoint"] else None
        record["model"] = adapter.describe()
        for n, timed in [(todo[0], False), *((n, True) for n in todo)]:
            try:
                ids = (
                    text.rows(values["rows"], n + 1, values["seed"])
                    if text
                    else np.random.default_rng(n).integers(0, VOCABULARY, (values["rows"], n + 1))
                )
            except ItemError as error:
                raise UserError(str(error)) from error
            row = measure(adapter, ids, values)
            if not timed:
                continue
            record["passes"][str(n)] = row
            record["verdict"] = verdict(record["passes"], device.type == "cuda")
            write_json(out, {**result, "environment": environment(device)})
            figures = (
                row.get("failed")
                or f"{row['seconds']:.1f} s, {row['tokens_per_second']:,.0f} tokens/s, peak {row['peak_memory_bytes']:,} bytes"
            )
            print(f"{name} ({record['model']['parameters']:,} parameters), {n:,} tokens: {figures}", flush=True)
        print(f"{name}: {record['verdict']}", flush=True)
        del adapter
    print(f"written: {out}")


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
