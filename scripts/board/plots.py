"""The board's three plots: loss, loss by position, and loss against speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report.figures import line, png, pyplot
from scripts.board.answers import bits
from scripts.board.results import interval


def plots(found: dict[str, Any], page: Path) -> list[str]:
    """Loss, loss by position and speed as pictures, those that there are figures for; their names."""
    plt = pyplot()
    if plt is None:
        return [name for name in ("loss.png", "position.png", "speed.png") if (page / name).exists()]
    made = []
    for name, picture in (("loss.png", _loss_plot), ("position.png", _position_plot), ("speed.png", _speed_plot)):
        data = picture(plt, found["rows"])
        if data is not None:
            write_bytes(page / name, data)
            made.append(name)
    return made


def _loss_plot(plt: Any, rows: dict[str, Any]) -> bytes | None:
    """The full pass with intervals; before there is one, the grid by rate."""
    if not any(row["pass"] or row["grid"] for row in rows.values()):
        return None
    figure, axes = plt.subplots(figsize=(8, 4.8))
    each = [(row["label"], interval(bits(rows, name, "pass").values())) for name, row in rows.items()]
    done = sorted(((label, value) for label, value in each if value is not None), key=lambda pair: -pair[1].mean)
    if done:
        halves = [value.half if math.isfinite(value.half) else 0.0 for _, value in done]
        axes.errorbar([value.mean for _, value in done], range(len(done)), xerr=halves, fmt="o", capsize=3)
        axes.set_yticks(range(len(done)), [label for label, _ in done])
        axes.set_xlabel("held-out bits per byte after the full pass, 95 % over seeds")
    else:
        for i, row in enumerate(rows.values()):
            points = [(c["lr"], c["bits_per_byte"]) for c in row["grid"] if not c["diverged"] and c["bits_per_byte"] is not None]
            if points:
                axes.plot(*zip(*points), marker="o", label=row["label"], **line(i))
        axes.set(xscale="log", xlabel="rate", ylabel="held-out bits per byte, a fifth of the pass, one seed")
        axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return png(plt, figure)


def _position_plot(plt: Any, rows: dict[str, Any]) -> bytes | None:
    figure, axes = plt.subplots(figsize=(8, 4.8))
    drawn = 0
    for i, row in enumerate(rows.values()):
        cell = next((cell for cell in row["pass"].values() if cell.get("buckets")), None)
        if cell:
            x = [max(1.0, (b["from"] * b["to"]) ** 0.5) for b in cell["buckets"]]
            axes.plot(x, [b["nats_per_token"] for b in cell["buckets"]], marker=".", label=row["label"], **line(i))
            drawn += 1
    axes.set(xscale="log", xlabel="position in the text", ylabel="nats per token (first seed)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7) if drawn else None
    data = png(plt, figure)
    return data if drawn else None


def _speed_plot(plt: Any, rows: dict[str, Any]) -> bytes | None:
    """Loss against training speed: the full pass, or the best of the grid before there is one."""
    figure, axes = plt.subplots(figsize=(8, 4.8))
    drawn = 0
    passed = any(row["pass"] for row in rows.values())
    for i, (name, row) in enumerate(rows.items()):
        values = (
            list(bits(rows, name, "pass").values())
            if passed
            else [min((c["bits_per_byte"] for c in row["grid"] if c["bits_per_byte"]), default=math.nan)]
        )
        if "speed" in row and values and math.isfinite(values[0]):
            axes.plot(
                row["speed"]["tokens_per_s"],
                sum(values) / len(values),
                marker="o",
                linestyle="",
                label=row["label"],
                color=line(i)["color"],
            )
            drawn += 1
    what = "after the full pass" if passed else "after a fifth of the pass, best rate, one seed"
    axes.set(xlabel="training tokens/s, alone on the device", ylabel=f"bits per byte {what}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7) if drawn else None
    data = png(plt, figure)
    return data if drawn else None
