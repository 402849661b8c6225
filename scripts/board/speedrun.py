"""The speedrun's part of the board's page: the record, how to beat it, and every attempt."""

from __future__ import annotations

import math
import statistics
from typing import Any

from scripts.board.cells import SPEEDRUN_TARGET
from scripts.board.order import SEEDS


def speedrun_lines(found: dict[str, Any]) -> list[str]:
    """The record, open to be beaten, and every attempt at it."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in found["rows"].values():
        for run in row["speedrun"]:
            groups.setdefault((row["label"], run["tokens"], run["lr"]), []).append(run)
    held = []
    table = ["", "| row | tokens | rate | seconds of each seed | bits per byte | device |", "|---" * 6 + "|"]
    for (label, tokens, lr), runs in sorted(groups.items(), key=lambda entry: min(r["bits_per_byte"] or math.inf for r in entry[1])):
        bits_of_runs = [run["bits_per_byte"] for run in runs]
        figures = [
            ", ".join("" if run[key] is None else format(run[key], form) for run in runs)
            for key, form in (("seconds", ".1f"), ("bits_per_byte", ".4f"))
        ]
        table.append(
            f"| {label} | {tokens / 1e6:.1f}M | {lr:g} | {' | '.join(figures)} | {', '.join(sorted({r['device'] for r in runs}))} |"
        )
        if len(runs) >= SEEDS and all(b is not None and b <= SPEEDRUN_TARGET for b in bits_of_runs):
            held.append((statistics.fmean(run["seconds"] for run in runs), label, tokens, bits_of_runs, runs[0]["command"]))
    lines = [f"The least time of training on one H100 or H200 to {SPEEDRUN_TARGET} bits per byte; rules are in the"]
    lines += ["[protocol](protocol.md#the-speedrun).", ""]
    if held:
        seconds, label, tokens, every, command = min(held)
        shown = ", ".join(f"{b:.4f}" for b in every)
        lines += [
            f"{seconds:.1f} s (mean of {len(every)}), {label}, {tokens / 1e6:.1f}M tokens, {shown} bits per byte:",
            "",
            f"    {command}",
        ]
    else:
        said = "There is no record yet: the attempts below are of too few seeds, or stay above." if groups else "Nobody has run it yet."
        example = "python -m scripts.board run stages=speedrun rows=ROW speedrun_tokens=N speedrun_lr=R data=DIR"
        lines += [f"{said} To try, with three seeds, any row of the board, any tokens and rate:", "", f"    {example}"]
    return [*lines, *(table if groups else [])]
