"""Draws what scripts/bench/parallel_rnn.py has measured, and makes the figures of corrections, which need no GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from kernels.parallel_rnn import reference
from scripts.bench.parallel_rnn_solve import inputs

DRAWN = ("paragru", "paralstm")


@torch.no_grad()
def correction_row(name: str, scale: float) -> dict[str, Any]:
    """Largest error of 31 slice starts (64 steps each) after 0, 1, ... corrections, float64, any device; the first guess is the slice before
    walked from zero. Recurrent weights are normal with deviation `scale`."""
    N, L = 32, 64
    cell, pre, rec, h0 = inputs(name, 1, N * L, 64, torch.float64, "cpu")
    rec = (rec * (scale * 64**0.5)).double()
    exact = reference.sequential(cell, pre, rec, h0.double(), None)[0][:, L - 1 : -1 : L]
    sliced = reference.slice_time(pre, N, L)
    start = torch.zeros(1, N, len(cell.state), 64, dtype=torch.float64)
    start[:, 1:] = reference.walk(cell, sliced, rec, start, None)[:, :-1, -1]
    errors = []
    for _ in range(9):
        errors.append(float((start[:, 1:] - exact).abs().max()))
        states = reference.walk(cell, sliced, rec, start, None)
        J = reference.jacobian(cell, sliced, rec, torch.cat([start[:, :, None], states[:, :, :-1]], 2))
        start = reference.corrected(states[:, :, -1], reference.product(J), start)
    return {"cell": name, "deviation": scale, "errors": errors}


def corrections(path: Path) -> None:
    """Writes the errors by correction to `path`; needs no GPU."""
    rows = [correction_row(name, scale) for name in ("paragru", "paralstm") for scale in (2048**-0.5, 0.5, 2.0, 8.0)]
    write_json(path, {"torch": torch.__version__, "device": "cpu", "rows": rows})


def plot(path: Path) -> None:
    """time.png, if it was measured: time by length against limit, Newton, loop and cuDNN; limits.png: times over the byte limit; corrections.png, if
    corrections.json lies beside."""
    from evals.report.figures import pyplot

    plt, result = pyplot(), json.loads(path.read_text())
    if plt is None:
        sys.exit("Plots need matplotlib: pip install matplotlib.")
    if "time" in result:
        _plot_time(plt, result, path)
    rows = [r for r in result["kernels"] if r.get("cell") in DRAWN and r["D"] == 2048]
    names = sorted({r["cell"] for r in rows})
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, way in zip(axes, ("forward", "backward")):
        for i, name in enumerate(names):
            mine = [r for r in rows if r["cell"] == name]
            at = [k + 0.8 * i / len(names) for k in range(len(mine))]
            axis.bar(at, [r[f"{way}_ms"] / r[f"{way}_limit_ms"] for r in mine], 0.75 / len(names), label=name)
            axis.set_xticks(range(len(mine)), [f"({r['B']}, {r['T']:,})" for r in mine], rotation=30)
        axis.axhline(1, color="k", linestyle="--", linewidth=1)
        axis.set(title=way, xlabel="(sequences, steps)", ylabel="times the byte limit (dashed)")
    axes[1].legend(fontsize=8)
    _save(plt, figure, path.with_name("limits.png"))
    beside = path.with_name("corrections.json")
    if not beside.exists():
        return
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    rows = json.loads(beside.read_text())["rows"]
    for axis, name in zip(axes, ("paragru", "paralstm")):
        for r in (r for r in rows if r["cell"] == name):
            axis.plot([max(e, 1e-17) for e in r["errors"]], "o-", label=f"{r['deviation']:.3g}")
        axis.set(yscale="log", title=name, xlabel="corrections", ylabel="largest error of a slice's start")
        axis.grid(alpha=0.3)
    axes[1].legend(title="deviation of\nthe weights", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(plt, figure, path.with_name("corrections.png"))


def _plot_time(plt: Any, result: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(9.5, 4.5))
    times, newton = result["time"], result["newton"]
    axis.plot([r["T"] for r in times], [r["forward_ms"] for r in times], "o-", label="parallel solve")
    axis.plot([r["T"] for r in times], [r["limit_ms"] for r in times], "k--", label="byte limit")
    axis.plot([r["T"] for r in newton], [r["newton_3_ms"] for r in newton], "s-", label="3 elementwise Newton steps, torch")
    loop = result["loop"]
    axis.plot([r["T"] for r in loop], [r["loop_ms"] for r in loop], "^-", label="torch loop")
    gru = [r for r in result["cudnn"] if r.get("cudnn") == "GRU"]
    axis.plot([r["T"] for r in gru], [r["forward_ms"] for r in gru], "x", markersize=9, label="cuDNN GRU (dense weights)")
    axis.set(xscale="log", yscale="log", xlabel="time steps", ylabel="ms", title=f"ParaGRU forward, width 2048, {result['device']}")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    _save(plt, figure, path.with_name("time.png"))


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
