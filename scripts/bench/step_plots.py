"""Draws where the time of training steps goes, from what scripts/bench/step.py has written: a bar a row, its parts beside their ceilings.

python -m scripts.bench.step out=docs/results/step/parts.png draw=docs/results/step/a.json,docs/results/step/b.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLOURS = {
    "products": "#4a78b5", "attention": "#8a5aa8", "recurrence": "#d1495b", "norm, convolution, gates": "#66a182", "copies and adds": "#c9c9c9",
    "loss": "#edae49", "optimizer": "#7a6a58", "casts to 8 bits": "#30a5b8", "other": "#e6e6e6", "no kernel": "#ffffff",
}  # fmt: skip


def rows_of(files: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(label, row) of all of our rows that were profiled."""
    made = []
    for file in files:
        read = json.loads(file.read_text())
        for name, rows in read["rows"].items():
            for label, row in rows.items():
                if label.startswith("ours") and "parts_ms" in row:
                    made.append((f"{name} x {row['rows']}{label[4:]}\n{row['tokens_per_s'] / 1e3:.1f}k tokens/s", row))
    return made


def draw(out: Path, files: list[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, labelled = rows_of(files), set[str]()
    figure, axes = pyplot.subplots(figsize=(10, 0.6 * len(rows) + 1.4))
    for y, (_, row) in enumerate(rows):
        at, parts = 0.0, dict(row["parts_ms"])
        parts["no kernel"] = max(0.0, row["step_ms"] - sum(parts.values()))
        best = {part["part"]: part["ceiling_ms"] for part in row.get("ceilings", {}).get("parts", [])}
        for part, colour in COLOURS.items():
            ms = parts.get(part, 0.0)
            if ms:
                axes.barh(y, ms, left=at, color=colour, edgecolor="#555555", linewidth=0.4, label=part if part not in labelled else None)
                labelled.add(part)
                if part in best:
                    axes.barh(y, min(best[part], ms), left=at, height=0.25, color="none", edgecolor="black", linewidth=0.8)
            at += ms
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step; boxes: what the card gives for the same bytes or products")
    axes.legend(fontsize=7, ncol=5, loc="upper center", bbox_to_anchor=(0.45, 1.0 + 0.9 / (len(rows) + 1)))
    figure.tight_layout()
    figure.savefig(out, dpi=110)
