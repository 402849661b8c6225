"""The board's three plots: loss, loss by position, and loss against speed."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report.figures import line, png, pyplot
from scripts.board.answers import bits
from scripts.board.architectures import ARCHITECTURES
from scripts.board.plan import SEEDS
from scripts.board.results import interval


def plots(found: dict[str, Any], page: Path) -> list[str]:
    """Loss, loss by position and speed as pictures, those that there are figures for; their names."""
    plt = pyplot()
    if plt is None:
        return [name for name in ("loss.png", "position.png", "speed.png") if (page / name).exists()]
    made, stage = [], stage_of(found["rows"])
    tokens = f"{found['tokens'][stage] / 1e6:.3g}M tokens"
    for name, picture in (
        ("loss.png", _loss_plot),
        ("position.png", functools.partial(_position_plot, T=found["T"])),
        ("speed.png", _speed_plot),
    ):
        data = picture(plt, found["rows"], stage, tokens)
        if data is not None:
            write_bytes(page / name, data)
            made.append(name)
    return made


def stage_of(rows: dict[str, Any]) -> str:
    """The stage that is drawn: the one of most tokens that has three rows or more, or else stage 0."""
    return next((stage for stage in ("pass", "stage1") if sum(bool(row[stage]) for row in rows.values()) > 2), "stage0")


def _loss_plot(plt: Any, rows: dict[str, Any], stage: str, tokens: str) -> bytes | None:
    """A stage with intervals; before there is one, the rates tried."""
    if not any(row[stage] or row["grid"] or row["rates0"] for row in rows.values()):
        return None
    each = [(row["label"], interval(bits(rows, name, stage).values()), bits(rows, name, stage)) for name, row in rows.items()]
    done = sorted(((label, value, seeds) for label, value, seeds in each if value is not None), key=lambda entry: -entry[1].mean)
    figure, axes = plt.subplots(figsize=(8.5, max(3.0, 1.2 + 0.32 * len(done))) if done else (8, 4.8))
    if done:
        halves = [
            value.half if value.n >= SEEDS and math.isfinite(value.half) else 0.0 for _, value, _ in done
        ]  # of two seeds an interval is wider than the plot
        for place, (_, _, seeds) in enumerate(done):
            axes.plot(list(seeds.values()), [place] * len(seeds), "o", markersize=3, color="0.6", zorder=3)
        axes.errorbar([value.mean for _, value, _ in done], range(len(done)), xerr=halves, fmt="D", markersize=4, capsize=3, zorder=2)
        axes.set_yticks(range(len(done)), [label for label, _, _ in done], fontsize=8)
        axes.set_xlabel(f"held-out bits per byte after {tokens}: mean, 95 % over {SEEDS} seeds or more (grey: each seed)")
    else:
        kind = "grid" if any(row["grid"] for row in rows.values()) else "rates0"
        for i, row in enumerate(rows.values()):
            points = [(c["lr"], c["bits_per_byte"]) for c in row[kind] if not c["diverged"] and c["bits_per_byte"] is not None]
            if points:
                axes.plot(*zip(*points), marker="o", label=row["label"], **line(i))
        axes.set(xscale="log", xlabel="rate", ylabel="held-out bits per byte, one seed")
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return png(plt, figure)


def _position_plot(plt: Any, rows: dict[str, Any], stage: str, tokens: str, T: int) -> bytes | None:
    """Loss by position in long held-out documents, with a mark at the training length."""
    figure, axes = plt.subplots(figsize=(8.5, 5))
    drawn = 0
    for i, row in enumerate(
        row for name, row in rows.items() if not ARCHITECTURES[name].of
    ):  # the others are too near to these to be told apart
        cell = next((cell for cell in row[stage].values() if cell.get("buckets")), None)
        if cell:
            x = [max(1.0, (b["from"] * b["to"]) ** 0.5) for b in cell["buckets"]]
            axes.plot(x, [b["nats_per_token"] for b in cell["buckets"]], marker=".", label=row["label"], **line(i))
            drawn += 1
    axes.axvline(T, color="0.5", linestyle="--", linewidth=1, label=f"training length, {T}")
    axes.set(xscale="log", xlabel="position in the text", ylabel=f"nats per token (one seed, {tokens})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left") if drawn else None
    data = png(plt, figure)
    return data if drawn else None


def _speed_plot(plt: Any, rows: dict[str, Any], stage: str, tokens: str) -> bytes | None:
    """Loss against training speed, of the stage's own cells or, better, alone on the device. Names stand in a list, as points lie close."""
    figure, axes = plt.subplots(figsize=(8.5, 5))
    drawn = 0
    for name, row in rows.items():
        values = list(bits(rows, name, stage).values())
        speed = (row.get("speed") or row["trained"] or {}).get("tokens_per_s")
        if len(values) >= SEEDS and speed:
            value, style = interval(values), line(drawn)
            assert value is not None
            axes.errorbar(
                speed / 1e3,
                value.mean,
                yerr=value.half,
                marker="osD^vP*"[drawn % 7],
                capsize=2,
                linestyle="",
                label=row["label"],
                color=style["color"],
            )
            drawn += 1
    axes.set(xlabel="training, thousands of tokens/s, one cell on the device", ylabel=f"bits per byte after {tokens}, 95 % over seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left") if drawn else None
    data = png(plt, figure)
    return data if drawn else None
