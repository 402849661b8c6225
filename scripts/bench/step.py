"""A whole training step on one GPU: tokens/s, share of the peak, memory, and where the time goes, beside transformers with torch.compile.

    python -m scripts.bench.step out=docs/results/step/h100.json                         # all rows of models=, some minutes
    python -m scripts.bench.step out=FILE models=transformer-400m peers=false packed=true
    python -m scripts.bench.step out=FILE against=v0.1                                    # the same rows of another commit beside them
    python -m scripts.bench.step out=FILE models=transformer-400m optimizer=adamw,muon    # a row for each; symmetric=false: products whole
    python -m scripts.bench.step out=FILE models=transformer-400m,gdn_hybrid-400m length=8192 peers=false
    python -m scripts.bench.step draw=FILE,FILE out=docs/results/step/parts.png           # the parts of their rows as bars

A step is forward, backward, clipping and the optimizer, with fp32 weights and products in bf16 (autocast), as `train.py` runs it on one GPU but for
DeepSpeed and the loader. Every row runs in a process of its own. tokens/s are medians; `idle` is the share of the profiled step in which no kernel
runs; packed rows hold documents of 200 to 4,000 tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from data.files import check_writable, write_json
from scripts.bench.step_plots import draw
from scripts.bench.step_worker import FAMILIES, SIZES, T
from training.config.arguments import parse_arguments, program
from training.cost.flops import peak_flops
from training.errors import UserError
from training.watch.metrics import environment

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS: dict[str, Any] = {
    "out": "",  # JSON to write
    "models": "transformer-400m,paragru-400m,hybrid-400m,mamba2-400m,transformer-1b,paragru-1b",  # family-size
    "rows": 0,  # sequences of a step; 0: 16 at 400m, 8 at 1b, so many times fewer as they are longer than 2,048 tokens
    "length": T,  # tokens of a sequence
    "steps": 20,  # timed steps of a row
    "packed": False,  # documents end inside rows too
    "graph": True,  # forward and backward as one CUDA graph, as train.cuda_graph=auto has them
    "attention": "auto",  # of packed documents, as train.packed_attention: auto, own or torch
    "fp8": False,  # large products of our rows in 8-bit floats, as train.fp8
    "residual": "fp32",  # the residual stream of our rows, as train.residual: fp32, bf16, or both (fp32,bf16), a row for each
    "optimizer": "adamw",  # of our rows: adamw, muon, muon3 (with three steps of Newton and Schulz), or several
    "symmetric": True,  # Muon's symmetric products by the kernel that computes half of them
    "ceilings": True,  # beside the largest parts of a step what they could take at best on this card, see scripts/bench/ceilings.py
    "peers": True,  # transformers' Llama under torch.compile beside the Transformer, as it is and with attention that takes no mask
    "draw": "",  # files of before whose rows are drawn into out=FILE.png; nothing is measured
    "against": "",  # another commit, whose rows are measured in turn
}
SLOWER = 0.02  # of its rate before, from which a row is called slower
# Of a row, on the screen.
SHOWN = "losses_from_to tokens_per_s mfu step_ms update_ms kernels_ms idle peak_gib first_step_s parts_ms".split()


def run_row(
    tree: Path, name: str, rows: int, values: dict[str, Any], is_peer: bool, peak: float | None, kind: str, residual: str = "fp32"
) -> dict[str, Any]:
    """`measure` in a process of its own, of the code under `tree`."""
    words = {
        **{key: values[key] for key in ("length", "steps", "graph", "symmetric", "attention", "fp8")},
        **{"name": name, "rows": rows, "is_peer": is_peer, "kind": kind, "residual": residual, "packed": values["packed"] and not is_peer},
        "ceilings": values["ceilings"] and not is_peer and tree == ROOT,
    }
    environment_ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH", "")])])}
    command = [
        sys.executable,
        str(Path(__file__).with_name("step_worker.py").resolve()),
        json.dumps(words),
    ]  # this file, with the code of `tree`
    done = subprocess.run(command, cwd=tree, env=environment_, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr or done.stdout).strip()[-600:]}
    row = json.loads(lines[-1])
    if peak:
        row["mfu"] = round(row["flops"] / row["step_ms"] * 1e3 / peak, 4)
    return row


def unpacked(revision: str, folder: Path) -> Path:
    """The tree of another commit."""
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise UserError(f"against={revision} is no commit of this repository: {archive.stderr.decode().strip()[:200]}")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def run(words: list[str]) -> None:
    values = parse_arguments(words, DEFAULTS)
    if not values["out"]:
        raise UserError("Name the JSON file to write: out=FILE.")
    if values["draw"]:
        return draw(Path(values["out"]), [Path(name) for name in values["draw"].split(",")])
    names = [name for name in values["models"].split(",") if name]
    for name in names:
        if name.partition("-")[0] not in FAMILIES or name.partition("-")[2] not in SIZES:
            raise UserError(
                f"There is no model {name!r}; write family-size with one of {', '.join(FAMILIES)} and one of {', '.join(SIZES)}."
            )
    if values["length"] < 2:
        raise UserError(f"length={values['length']} must be at least 2.")
    if values["attention"] not in ("auto", "own", "torch"):
        raise UserError(f"attention={values['attention']} is none of auto, own and torch.")
    kinds = [kind for kind in values["optimizer"].split(",") if kind]
    if not kinds or set(kinds) - {"adamw", "muon", "muon3", "muon2"}:
        raise UserError(f"optimizer={values['optimizer']} is not adamw, muon, muon3, muon2 or several of them, optimizer=adamw,muon.")
    streams = [residual for residual in values["residual"].split(",") if residual]
    if not streams or set(streams) - {"fp32", "bf16"}:
        raise UserError(f"residual={values['residual']} is not fp32, bf16 or both of them, residual=fp32,bf16.")
    check_writable(Path(values["out"]).parent)
    with tempfile.TemporaryDirectory() as folder:
        trees = {"ours": ROOT}
        if values["against"]:
            given = Path(values["against"])
            trees["against"] = given.resolve() if (given / "train.py").is_file() else unpacked(values["against"], Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peak = peak_flops(torch.cuda.get_device_name(), "bf16") if device.type == "cuda" else None
        result: dict[str, Any] = {**environment(device), "settings": values, "rows": {}}
        for name in names:
            rows = values["rows"] or max(1, SIZES[name.partition("-")[2]][5] * T // values["length"])
            cells = [
                (
                    ", ".join([label, *[kind] * (kind != "adamw"), *["stream of 16 bits"] * (residual == "bf16")]),
                    tree,
                    False,
                    kind,
                    residual,
                )
                for residual in streams
                for kind in kinds
                for label, tree in trees.items()
                if kind == "adamw" and residual == "fp32" or label == "ours"
            ]
            if values["peers"] and name.startswith("transformer"):
                cells += [
                    ("transformers compiled", ROOT, True, "adamw", "fp32"),
                    ("transformers compiled, attention without a mask", ROOT, True, "causal", "fp32"),
                ]
            for label, tree, is_peer, kind, residual in cells:
                row = run_row(tree, name, rows, values, is_peer, peak, kind, residual)
                result["rows"].setdefault(name, {})[label] = row
                write_json(Path(values["out"]), result)
                shown = {k: row.get(k) for k in SHOWN}
                print(f"{name} x {rows}, {label}: {json.dumps(shown) if 'error' not in row else row['error']}", flush=True)
                for part in row.get("ceilings", {}).get("parts", []):
                    print(f"    {part['part']:<28}{part['ms']:>9.2f} ms, at best {part['ceiling_ms']:.2f} ({part['of']}): {part['over']}")
            compare(name, result["rows"][name])
            write_json(Path(values["out"]), result)


def compare(name: str, rows: dict[str, Any]) -> None:
    """Says how our row stands to those beside it."""
    rates = {label: row["tokens_per_s"] for label, row in rows.items() if "tokens_per_s" in row}
    for label, rate in rates.items():
        if label != "ours" and "ours" in rates:
            rows[label]["ours_over_this"] = round(rates["ours"] / rate, 4)
            slower = ": SLOWER than before" if label == "against" and rates["ours"] < (1 - SLOWER) * rate else ""
            print(f"{name}: ours is {rates['ours'] / rate:.3f} of {label}{slower}", flush=True)


if __name__ == "__main__":
    sys.exit(program(__doc__, run))
