"""The board's three plots: loss, loss by position, and loss against speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from data.files import write_bytes
from evals.report.figures import line, png, pyplot
from scripts.board.answers import bits
from scripts.board.architectures import ARCHITECTURES
from scripts.board.order import SEEDS
from scripts.board.results import Interval, interval
from scripts.board.summary import leading
from scripts.board.tables import STAGE_NAMES, shown_stages

STAGES = tuple(STAGE_NAMES)


def plots(found: dict[str, Any], page: Path) -> list[str]:
    """Loss, loss by position and speed as pictures, those that there are figures for; their names."""
    plt = pyplot()
    if plt is None:
        return [name for name in ("loss.png", "position.png", "speed.png") if (page / name).exists()]
    made, stage = [], stage_of(found["rows"])
    tokens = f"{found['tokens'][stage] / 1e6:.3g}M tokens"
    for name, picture in (
        ("loss.png", lambda plt, rows, stage, tokens: _loss_plot(plt, rows, found)),
        ("position.png", lambda plt, rows, stage, tokens: _position_plot(plt, rows, found)),
        ("speed.png", _speed_plot),
    ):
        data = picture(plt, found["rows"], stage, tokens)
        if data is not None:
            write_bytes(page / name, data)
            made.append(name)
    return made


def stage_of(rows: dict[str, Any]) -> str:
    """The stage that is drawn: the full pass where three rows have it, or else that of the whole table."""
    return "pass" if sum(bool(row["pass"]) for row in rows.values()) > 2 else leading(rows)


def _loss_plot(plt: Any, rows: dict[str, Any], found: dict[str, Any]) -> bytes | None:
    """Every stage with intervals, one below the other, the whole one first; before there is one, the rates tried."""
    if not any(row[stage] or row["grid"] or row["rates0"] for row in rows.values() for stage in STAGES):
        return None
    panels = [(stage, done) for stage in _drawn(rows) if (done := _means(rows, stage))]
    if not panels:
        return _rates_plot(plt, rows)
    sizes = [1.0 + len(done) for _, done in panels]
    figure, every = plt.subplots(len(panels), figsize=(8.5, 1.4 * len(panels) + 0.26 * sum(sizes)), squeeze=False, height_ratios=sizes)
    for axes, (stage, done) in zip(every[:, 0], panels):
        # Of two seeds an interval is wider than the plot.
        halves = [value.half if value.n >= SEEDS and math.isfinite(value.half) else 0.0 for _, value, _ in done]
        for place, (_, _, seeds) in enumerate(done):
            axes.plot(list(seeds.values()), [place] * len(seeds), "o", markersize=3, color="0.6", zorder=3)
        axes.errorbar([value.mean for _, value, _ in done], range(len(done)), xerr=halves, fmt="D", markersize=4, capsize=3, zorder=2)
        axes.set_yticks(range(len(done)), [label for label, _, _ in done], fontsize=8)
        alone = ", one seed and so no interval" if all(value.n == 1 for _, value, _ in done) else ""
        axes.set_xlabel(f"held-out bits per byte after {found['tokens'][stage] / 1e6:.3g}M tokens{alone}", fontsize=9)
        axes.set_ylim(-0.6, len(done) - 0.4)
        axes.grid(alpha=0.3)
    every[0, 0].set_title(f"mean, 95 % over {SEEDS} seeds or more (grey: each seed)", fontsize=9)
    figure.tight_layout()
    return png(plt, figure)


def _drawn(rows: dict[str, Any]) -> list[str]:
    """The stages of the page's plots: the leaders' longer run before the others, where there is one."""
    return [stage for stage in ("leaders", *shown_stages(rows)) if any(bits(rows, name, stage) for name in rows)]


def _means(rows: dict[str, Any], stage: str) -> list[tuple[str, Interval, dict[int, float]]]:
    """(label, mean, each seed) of the rows of a stage, the worst first."""
    each = [(row["label"], interval(bits(rows, name, stage).values()), bits(rows, name, stage)) for name, row in rows.items()]
    return sorted(((label, value, seeds) for label, value, seeds in each if value is not None), key=lambda entry: -entry[1].mean)


def _rates_plot(plt: Any, rows: dict[str, Any]) -> bytes:
    figure, axes = plt.subplots(figsize=(8, 4.8))
    kind = "grid" if any(row["grid"] for row in rows.values()) else "rates0"
    for i, row in enumerate(rows.values()):
        points = [(c["lr"], c["bits_per_byte"]) for c in row[kind] if not c["diverged"] and c["bits_per_byte"] is not None]
        if points:
            axes.plot(*zip(*points), marker="o", label=row["label"], **line(i))
    axes.set(xscale="log", xlabel="rate", ylabel="held-out bits per byte, one seed")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    return png(plt, figure)


def _position_plot(plt: Any, rows: dict[str, Any], found: dict[str, Any]) -> bytes | None:
    """Loss by position in long held-out documents, with a mark at the training length: a panel for each stage in which rows were read."""
    curves: dict[str, list[tuple[int, str, list[dict[str, float]]]]] = {}
    for stage in _drawn(rows):
        # Rows that are compared with another one are too near to it to be told apart.
        for i, row in enumerate(row for name, row in rows.items() if not ARCHITECTURES[name].of):
            if cell := next((cell for cell in row[stage].values() if cell.get("buckets")), None):
                curves.setdefault(stage, []).append((i, row["label"], cell["buckets"]))
    if not curves:
        return None
    figure, every = plt.subplots(len(curves), figsize=(8.5, 0.8 + 3.8 * len(curves)), squeeze=False, sharex=True)
    for axes, (stage, drawn) in zip(every[:, 0], curves.items()):
        for i, label, buckets in drawn:
            x = [max(1.0, (b["from"] * b["to"]) ** 0.5) for b in buckets]
            axes.plot(x, [b["nats_per_token"] for b in buckets], marker=".", label=label, **line(i))
        axes.axvline(found["T"], color="0.5", linestyle="--", linewidth=1, label=f"training length, {found['T']}")
        axes.set(xscale="log", ylabel=f"nats per token, {found['tokens'][stage] / 1e6:.3g}M tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, bbox_to_anchor=(1.01, 1), loc="upper left")
    every[-1, 0].set_xlabel("position in the text (one seed)")
    return png(plt, figure)


def _speed_plot(plt: Any, rows: dict[str, Any], stage: str, tokens: str) -> bytes | None:
    """Loss against training speed, of the stage's own cells or, better, alone on the device. Names stand in a list, as points lie close."""
    figure, axes = plt.subplots(figsize=(8.5, 5))
    drawn = 0
    for name, row in rows.items():
        values = list(bits(rows, name, stage).values())
        speed = row["training"].get("tokens_per_s")
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
