"""The first lines of the board's page: what is answered, to which width, and what is not."""

from __future__ import annotations

import textwrap
from typing import Any

from scripts.board.answers import NARROW, PREFIXES, Question, Rows, bits, deciding, questions, shown, sides
from scripts.board.architectures import ARCHITECTURES
from scripts.board.expected import OPEN, collapsed, muon_tokens, passing
from scripts.board.order import FINAL, SEEDS, TEN
from scripts.board.results import Interval, difference, unpaired


def final_stage(rows: Rows) -> str:
    """The stage of most tokens in which the ten rows have SEEDS seeds or more; the one that was planned to be whole before there is one."""
    return next((stage for stage in PREFIXES if all(len(bits(rows, row, stage)) >= SEEDS for row in TEN)), FINAL)


def layer_answers(rows: Rows) -> list[tuple[Question, str, Interval, int, int]]:
    """(question, stage, interval that decides, seeds of either side) of every comparison with one nonlinear layer that has seeds enough for an interval."""
    made = []
    for question in questions():
        if not ARCHITECTURES[question.one].instead:
            continue
        for stage in PREFIXES:
            one, other = sides(rows, question, stage)
            value = deciding(one, other)
            if value is not None and value.n > 1:
                made.append((question, stage, value, len(one), len(other)))
    return made


def layer_table(found: dict[str, Any]) -> list[str]:
    """What one nonlinear layer does, a line a comparison, the most tokens and then the narrowest interval first; empty where there is none."""
    heads = (
        "one nonlinear layer",
        "tokens",
        "difference, pairs of equal seeds",
        "over all seeds, not in pairs",
        "the one that decides is wide",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for question, stage, value, *_ in sorted(layer_answers(found["rows"]), key=lambda entry: (-found["tokens"][entry[1]], entry[2].half)):
        one, other = sides(found["rows"], question, stage)
        paired, every = difference(one, other), unpaired(one, other)
        about = question.about.removeprefix("One layer of ")
        wide = f"{2 * value.half:.4f}{', answered' if 2 * value.half < NARROW else ''}"
        pairs = "" if paired is None else shown(paired)
        whole = "" if every is None else f"{every.mean:+.4f} ({every.low:+.4f} to {every.high:+.4f}, {len(one)} and {len(other)})"
        lines.append(f"| {about} | {found['tokens'][stage] / 1e6:.3g}M | {pairs} | {whole} | {wide} |")
    return lines if len(lines) > 2 else []


def _layers(found: dict[str, Any], at: str) -> str:
    """Of the comparisons at equal tokens or time: which are answered to NARROW, how, and which are not."""
    mine = [entry for entry in layer_answers(found["rows"]) if entry[0].about.endswith(at)]
    if not mine:
        return f"One nonlinear layer, {at}: not answered, no pair of rows has seeds enough."
    final, narrow, wide = final_stage(found["rows"]), [], []
    for question, stage, value, *_ in sorted(mine, key=lambda entry: (-found["tokens"][entry[1]], entry[2].half)):
        about = question.about.removeprefix("One layer of ").removesuffix(f", {at}")
        where = f"{about} after {found['tokens'][stage] / 1e6:.3g}M tokens"
        effect = f"{'worse' if value.mean > 0 else 'better'} by {abs(value.mean):.4f}" if value.decides() else "no difference shown"
        if 2 * value.half < NARROW:
            loose = unpaired(*sides(found["rows"], question, stage))
            other = (
                f"; not in pairs {loose.low:+.4f} to {loose.high:+.4f}" if loose is not None and loose.decides() != value.decides() else ""
            )
            narrow.append(f"{where}, {effect} ({value.low:+.4f} to {value.high:+.4f}{other})")
        elif stage == final:
            wide.append(f"{where}, {effect} ({2 * value.half:.3f} wide)")
    others = len(mine) - len(narrow) - len(wide)
    more = f" other{'s' if others > 1 else ''}," if narrow or wide else ""
    wide += [f"{others}{more} in the table below"] if others else []
    told = f"One nonlinear layer, {at}: " + (f"answered to {NARROW} bits per byte: {'; '.join(narrow)}. " if narrow else "")
    return (told + (f"{'Not' if narrow else 'not'} to {NARROW}: {'; '.join(wide)}." if wide else "")).strip()


def summary(found: dict[str, Any]) -> list[str]:
    """The section, without its title."""
    rows, tokens = found["rows"], found["tokens"]
    whole = {stage: [row for row in rows if len(bits(rows, row, stage)) >= SEEDS] for stage in PREFIXES}
    counted = [
        f"{len(whole[s])} after {tokens[s] / 1e6:.3g}M tokens ({len(set(TEN) & set(whole[s]))} of the {len(TEN)} that the plan has first)"
        for s in PREFIXES
        if whole[s]
    ]
    items = [f"Rows with {SEEDS} seeds or more: {'; '.join(counted) or 'none yet'}."]
    items += [_layers(found, "at equal tokens"), _layers(found, "at equal time")]
    items.append(f"Past the training length, 64 times, {collapsed(rows)}.")
    items.append(f"What state passing costs: {'; '.join(passing(rows)) or OPEN}.")
    items.append(f"Muon against AdamW, {muon_tokens(rows)}.")
    items += ["Passkey was asked of a leader alone; what came out is in [its card](#models-for-transformers)."] if found["passkey"] else []
    lacking = [] if whole["pass"] else [f"the full pass of {tokens['pass'] / 1e6:.3g}M tokens"]
    if not any(row["leaders"] for row in rows.values()):
        lacking.append(f"the leaders on {tokens['leaders'] / 1e6:.3g}M tokens")
    lacking += ["125M parameters", *([] if found["passkey"] else ["passkey"])]
    items.append(f"Not run, so nothing here says it: {', '.join(lacking)}.")
    lines = [
        line
        for item in items
        for line in textwrap.wrap(f"- {item}", 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    ]
    table = layer_table(found)
    return [*lines, *(["", *table] if table else [])]
