"""What scripts/bench/multi_gpu.py says of its rows: a line of each, the table with summary.json, and the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.files import write_json


def enriched(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row without its long lists, with what follows from the others: efficiency against one GPU, the largest loss difference."""
    short = {key: value for key, value in row.items() if key not in ("losses", "samples", "overrides", "kind")}
    if "losses" in row and "stage" in row:
        same = [
            r
            for r in rows
            if (r.get("model"), r.get("size"), r.get("stage"), r["gpus"]) == (row["model"], row["size"], 1, 1) and "losses" in r
        ]
        short["efficiency"] = row["tokens_per_second_per_gpu"] / same[0]["tokens_per_second_per_gpu"] if same else None
    elif "losses" in row and row["id"] == "equal losses":
        one = next((r for r in rows if r.get("id") == "equal losses" and "losses" in r and r["gpus"] == 1), row)
        short["largest_relative_difference"] = max(abs(a - b) / b for a, b in zip(row["losses"], one["losses"]))
        short["same_samples"] = row["samples"] == one["samples"]
    return short


def line_of(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    short = enriched(row, rows)
    if "error" in row:
        text = f"failed: {''.join(str(row['error']).strip().splitlines()[-1:])}"
    elif "not_run" in row:
        text = f"not run: {row['not_run']}"
    elif "stage" in row:
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} % MFU  "
        share = "" if short["efficiency"] is None else f"efficiency {short['efficiency']:.3f}"
        text = f"{row['tokens_per_second_per_gpu']:>9,.0f} tokens/s a GPU  {mfu}{row['memory_gib']:.1f} GiB  {share}"
    elif "same_samples" in short:
        text = f"losses differ by {short['largest_relative_difference']:.1e} from one GPU's, same samples: {short['same_samples']}"
    elif row["part"] == "sequence":
        seconds, received = row["seconds"] if "seconds" in row else row["step_seconds"], sum(row["received_bytes"].values())
        right = f"correct: {row['correct']}  " if "correct" in row else ""
        faster = f"{row['speedup']:.2f}x one GPU  " if "speedup" in row else ""
        text = f"{right}{1e3 * seconds:,.1f} ms  {faster}{row['memory_gib']:.1f} GiB  {received:,} bytes received"
    else:
        text = f"losses differ by {row['largest_relative_difference']:.1e} from the run left alone"
    return f"{row['gpus']} x {row['part']:<9}{row['id']:<28}{text}"


def summary(out: Path) -> list[str]:
    """The table, and summary.json: each row with what follows from the others of its file."""
    lines, enriched_rows = [], []
    for path in sorted(out.glob("rows_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        enriched_rows += [{"rows": path.stem, **enriched(row, rows)} for row in rows]
        lines += [line_of(row, rows) for row in rows]
    write_json(out / "summary.json", enriched_rows)
    return lines


def note_of(rows: str) -> str:
    """The part of a rows file's name after its number of GPUs, as a note: `, later` for rows_4_later."""
    said = " ".join(rows.split("_")[2:])
    return f", {said}" if said else ""


def draw(out: Path) -> None:
    """efficiency.png and sequence.png beside the rows."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("No plots: matplotlib is not installed (pip install matplotlib, then draw=true).")
        return
    rows = json.loads((out / "summary.json").read_text())
    for name, chosen, value, label in (
        ("efficiency", [r for r in rows if r.get("efficiency") and r["gpus"] > 1], "efficiency", "tokens/s a GPU, share of one GPU's"),
        ("sequence", [r for r in rows if r.get("speedup")], "speedup", "speed of a layer against one GPU"),
    ):
        if not chosen:
            continue
        figure, axes = plt.subplots(figsize=(8, 0.22 * len(chosen) + 1.5))
        places = range(len(chosen))
        axes.barh(places, [r[value] for r in chosen])
        axes.set_yticks(places, [f"{r['id']}, {r['gpus']} GPUs{note_of(r['rows'])}" for r in chosen], fontsize=7)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel(label)
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=120)
        plt.close(figure)
