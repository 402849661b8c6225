"""Everything of the board behind its page (scripts/board/page.py): each answer in a sentence, rates, tables of every stage, costs, what is missing."""

from __future__ import annotations

import textwrap
from typing import Any

from scripts.board.answers import Answer, all_answers, bits, probe_answers
from scripts.board.architectures import ARCHITECTURES, WAITING
from scripts.board.cells import TASKS
from scripts.board.order import LEADERS, SEEDS
from scripts.board.summary import layer_table, whole
from scripts.board.tables import (
    RATES,
    STAGE_NAMES,
    again_table,
    beside_lines,
    cost_lines,
    earlier_table,
    filled,
    grid_table,
    loss_table,
    shown_stages,
)

OUTDATED = "they have the steps that earlier speeds asked for, or the rows have not been timed since a step became quicker."


def details_text(found: dict[str, Any]) -> str:
    """details.md of the page."""
    rows = found["rows"]
    stages = shown_stages(rows)
    lines = ["# The board in detail", "", *filled("All that is behind [the page](README.md), drawn by the same command."), ""]
    lines += ["## One nonlinear layer", "", *layer_table(found), ""] if layer_table(found) else []
    for stage in stages:
        lines += [f"## {STAGE_NAMES[stage].capitalize()}", "", *loss_table(found, stage), "", *_sentences(all_answers(rows, stage))]
    if found["outdated"]:
        lines += [*filled(f"{found['outdated']} cells of equal time are left out: {OUTDATED}"), ""]
    if probes := probe_answers(rows):
        lines += ["## Probes", "", *_items(probes), ""]
    tried = [line for stage in RATES for line in grid_table(found, stage)]
    lines += ["## Rates tried", "", *(tried or ["No cell of the grid is finished.", ""])]
    lines += ["## Run again", "", *again_table(found), ""] if found["again"] else []
    lines += ["## What a cell costs", "", *cost_lines(found["phases"]), ""] if found["phases"] else []
    lines += ["## Cells side by side", "", *beside_lines(found["beside"]), ""] if found["beside"] else []
    if found["earlier"]:
        lines += ["## Under earlier versions of the protocol", "", *earlier_table(found["earlier"]), ""]
    answers = [a for stage in stages or ["pass"] for a in all_answers(rows, stage)]
    lines += ["## Missing", "", *missing_table(found, answers), ""]
    return "\n".join(lines)


def _sentences(answers: list[Answer]) -> list[str]:
    """Nulls and negative ones, and of how many comparisons they are; then the others."""
    known = [a for a in answers if a.known]
    lines = ["Nulls and negative results:", "", *(_items([a for a in known if a.negative]) or ["None yet: nothing has been compared."]), ""]
    if rest := [a for a in known if not a.negative]:
        lines += ["Otherwise:", "", *_items(rest), ""]
    return lines


def missing_table(found: dict[str, Any], answers: list[Answer]) -> list[str]:
    """What the board is to have and does not, by stage, and the questions without an answer."""
    rows = found["rows"]

    def lacking(done: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in ARCHITECTURES if name not in done) if done else "all of it"

    wanted = [name for name, row in ARCHITECTURES.items() if (row.optimizer, row.initial) == ("adamw", "zero")]
    entries = [
        (f"{STAGE_NAMES[stage]}, {found['tokens'][stage] / 1e6:.3g}M tokens, {SEEDS} seeds or more", whole(rows, stage))
        for stage in STAGE_NAMES
    ]
    entries.append(("speed alone on the device, decoding, memory", [name for name, row in rows.items() if "speed" in row]))
    lines = ["| what | rows done | missing |", "|---|---|---|"]
    lines += [f"| {what} | {len(done)} of {len(ARCHITECTURES)} | {lacking(done)} |" for what, done in entries]
    seeds = {name: len(bits(rows, name, "leaders")) for name in LEADERS}
    each = ", ".join(f"`{name}` {SEEDS - n}" for name, n in seeds.items() if n < SEEDS)
    done = [name for name, n in seeds.items() if n >= SEEDS]
    lines.append(
        f"| the leaders, {found['tokens']['leaders'] / 1e6:.3g}M tokens, {SEEDS} seeds | {len(done)} of {len(LEADERS)} | seeds of {each or 'none'} |"
    )
    for title, task in TASKS.items():
        probed = [name for name, row in rows.items() if task["name"] + task.get("group", "") in row["probe"]]
        missing = ", ".join(f"`{name}`" for name in wanted if name not in probed) if probed else "all of it"
        lines.append(f"| probe: {title} | {len(probed)} of {len(wanted)} | {missing} |")
    lines += [f"| {label} | 0 | no mixer yet, so no cells |" for label in WAITING.values()]
    if unanswered := list(dict.fromkeys(a.text.removesuffix(": not measured yet.") for a in answers if not a.known)):
        lines += ["", "Questions of which one side is measured and the other is not:", ""]
        lines += _items([Answer(text, False) for text in unanswered])
    return lines


def _items(answers: list[Answer]) -> list[str]:
    return [textwrap.fill(f"- {a.text}", 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for a in answers]


def log_text(found: dict[str, Any]) -> str:
    """log.md: every attempt, in order."""
    lines = ["# Every attempt", "", "Nothing is taken out of this list; a cell that was stopped goes on from where it was.", ""]
    lines += ["| at (UTC) | cell | event | |", "|---|---|---|---|"]
    for a in found["attempts"]:
        about = {k: v for k, v in a.items() if k not in ("at", "cell", "event", "traceback")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items()).replace("|", "/")
        lines.append(f"| {a['at']} | {a['cell']} | {a['event']} | {text} |")
    return "\n".join(lines) + "\n"
