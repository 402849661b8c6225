"""Draws what scripts/bench/dense_sets.py and scripts/studies/dense_init.py have measured.

python -m scripts.bench.dense_sets --plot docs/results/dense_rnn

From sets.json time.png (time against T: the solve, the walk in order, cuDNN, and FlashRNN from flashrnn.json); from difficulty.json, or else sets.json, corrections.png (against the
memory of the forget gates and the gain of the matrices); from the trainings of sets.json training.png, and from init.json, or else init_cpu.json, initialisation.png (corrections and loss over training).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report.figures import png, pyplot


def time_against_length(plt: Any, rows: list[dict[str, Any]], peer: list[dict[str, Any]], folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, key, title in zip(axes, ("forward_ms", "forward_backward_ms"), ("forward", "forward and backward, all gradients")):
        for name in ("ours", "in order", "cudnn"):
            points = [(row["T"], row[name][key]) for row in rows if key in row[name]]
            axis.plot(*zip(*points), "o-", label={"ours": "over slices", "cudnn": "cuDNN fp16, one head"}.get(name, name))
        if points := sorted((row["shape"][1], row[key]) for row in peer if key in row and row["shape"][0] == 4):
            axis.plot(*zip(*points), "s--", label="FlashRNN, Triton")
        axis.set(xscale="log", yscale="log", title=title, xlabel="steps of each of 4 rows")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].set_ylim(bottom=0.008)  # room for the names below the lines
    axes[0].legend(loc="lower right")
    write_bytes(folder / "time.png", png(plt, figure))


def difficulty(plt: Any, rows: list[dict[str, Any]], folder: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, side, title in zip(axes, ("", "_backward"), ("states", "adjoints")):
        for bias in sorted({row["forget bias"] for row in rows}):
            mine = [row for row in rows if row["forget bias"] == bias and row["slices"] == 16]
            gains, needed = [row["gain"] for row in mine], [row[f"corrections{side}"] for row in mine]
            shown = axis.plot(gains, needed, "-", label=f"{bias:g}")[0]
            for gain, n, row in zip(gains, needed, mine):
                axis.plot(gain, n, "x" if row[f"walked{side}"] > 0 else "o", color=shown.get_color())
        axis.set(xscale="log", title=f"{title}, 16 slices of 64 (x: some walked in order)", xlabel="gain of the matrices")
        gains = sorted({row["gain"] for row in rows})
        axis.set_xticks(gains, [f"{gain:g}" for gain in gains])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("corrections made")
    axes[1].legend(title="forget bias")
    write_bytes(folder / "corrections.png", png(plt, figure))


def over_training(plt: Any, runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A line for each run by name; runs whose names end in ", seed N" have one colour."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    kinds: list[str] = []
    for name, steps in runs.items():
        kind, at = name.partition(", seed ")[0], [row["step"] for row in steps]
        style = {"label": None if kind in kinds else kind}
        kinds += [kind] if kind not in kinds else []
        for axis, key in zip(axes, ("loss", "dense_corrections", "dense_slices")):
            axis.plot(at, [row[key] for row in steps], color=f"C{kinds.index(kind)}", linewidth=1.2, alpha=0.8, **style)
    for axis, label in zip(axes, ("loss", "corrections of a forward solve", "slices in force")):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    write_bytes(path, png(plt, figure))


def draw(folder: Path) -> None:
    plt = pyplot()
    if plt is None:
        sys.exit("Plots need matplotlib: pip install matplotlib.")
    names = ("sets.json", "init.json", "init_cpu.json", "difficulty.json", "flashrnn.json")
    if not any((folder / name).exists() for name in names):
        sys.exit(f"{folder} has none of {', '.join(names)}; measure first, or name another folder.")
    sets, init, small, hard, peers = (json.loads(path.read_text()) if (path := folder / name).exists() else {} for name in names)
    if "over T" in sets:
        time_against_length(plt, sets["over T"], [r for r in peers.get("flashrnn", []) if r["backend"] == "triton_fused"], folder)
    if "difficulty" in hard or "difficulty" in sets:
        difficulty(plt, (hard or sets)["difficulty"], folder)
    trained = {name: steps for name, steps in sets.get("training", {}).items() if isinstance(steps, list) and steps}
    begun = {f"{run['kind']}, seed {run['seed']}": run["steps"] for run in (init or small).get("runs", []) if run.get("steps")}
    for name, runs in (("training.png", trained), ("initialisation.png", begun)):
        if runs:
            over_training(plt, runs, folder / name)
