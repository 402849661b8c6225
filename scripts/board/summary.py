"""The first lines of the board's page: what is answered, to which width, and what is not."""

from __future__ import annotations

import statistics
import textwrap
from typing import Any

from scripts.board.answers import NARROW, PREFIXES, Question, Rows, bits, deciding, probe_counts, questions, shown, sides
from scripts.board.architectures import ARCHITECTURES
from scripts.board.expected import OPEN, collapsed, muon_tokens, passing
from scripts.board.longer import longer_answer
from scripts.board.order import FINAL, LEADING_ROWS, SEEDS
from scripts.board.results import Interval, difference, unpaired


def leading(rows: Rows) -> str:
    """The stage of the page's first table: the one of most tokens in which LEADING_ROWS rows are whole; before there is one, FINAL."""
    return next((stage for stage in PREFIXES if len(whole(rows, stage)) >= LEADING_ROWS), FINAL)


def whole(rows: Rows, stage: str) -> list[str]:
    """The rows with SEEDS seeds or more in a stage: the one count of them that there is."""
    return [row for row in rows if len(bits(rows, row, stage)) >= SEEDS]


def ranking(found: dict[str, Any]) -> str:
    """Who is best at equal tokens in the leading stage, and how the others stand to the Transformer, of the whole rows; empty before there are some. Told
    apart are two rows where the interval in pairs and the one over all seeds say so: three pairs agree by chance too easily to rank by."""
    rows, stage = found["rows"], leading(found["rows"])
    means = {row: statistics.fmean(bits(rows, row, stage).values()) for row in whole(rows, stage)}
    if "transformer" not in means or len(means) < 2:
        return ""
    best, *others = sorted(means, key=means.__getitem__)

    def apart(row: str, other: str) -> bool:
        sides = bits(rows, row, stage), bits(rows, other, stage)
        return all(value is not None and value.decides() for value in (deciding(*sides), unpaired(*sides)))

    def named(chosen: list[str]) -> str:
        return "; ".join(f"{ARCHITECTURES[row].label} ({means[row] - means['transformer']:+.3f})" for row in chosen) or "none"

    near = [ARCHITECTURES[row].label for row in others if not apart(row, best)]
    beside = [row for row in (best, *others) if row != "transformer"]
    level = [row for row in beside if not apart(row, "transformer")]
    ahead, behind = ([row for row in beside if row not in level and (means[row] - means["transformer"]) * sign > 0] for sign in (-1, 1))
    return (
        f"Equal tokens, {found['tokens'][stage] / 1e6:.3g}M, {len(means)} rows: {ARCHITECTURES[best].label} has the fewest bits per byte, {means[best]:.4f}; not told "
        f"apart from it, in pairs and over all seeds: {'; '.join(near) or 'none'}. Against the Transformer ({means['transformer']:.4f}) not told apart: {named(level)}; ahead: "
        f"{named(ahead)}; behind: {named(behind)}."
    )


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
    """Of the comparisons at equal tokens or time: the one of most tokens and the narrowest one of each layer."""
    mine = [entry for entry in layer_answers(found["rows"]) if entry[0].about.endswith(at)]
    if not mine:
        return f"One nonlinear layer, {at}: not answered, no pair of rows has seeds enough."
    told = []
    for layer in dict.fromkeys(ARCHITECTURES[entry[0].one].instead for entry in mine):
        of_layer = [entry for entry in mine if ARCHITECTURES[entry[0].one].instead == layer]
        most = min(of_layer, key=lambda entry: (-found["tokens"][entry[1]], entry[2].half))
        narrowest = min(of_layer, key=lambda entry: entry[2].half)
        each = [_layer(found, *entry) for entry in ([most] if most is narrowest else [most, narrowest])]
        told.append(f"{ARCHITECTURES[layer].label}: {'; '.join(each)}")
    return f"One nonlinear layer, {at}, bits per byte. " + ". ".join(told) + ". All of them: [details](details.md#one-nonlinear-layer)."


def _layer(found: dict[str, Any], question: Question, stage: str, value: Interval, *seeds: int) -> str:
    effect = ("worse" if value.mean > 0 else "better") if value.decides() else "no difference shown"
    wide = "" if 2 * value.half < NARROW else f", {2 * value.half:.3f} wide"
    where = f"{ARCHITECTURES[question.other].label}, {found['tokens'][stage] / 1e6:.3g}M tokens"
    said = f"{effect} in the {where}, {value.mean:+.4f} ({value.low:+.4f} to {value.high:+.4f}{wide})"
    if value.decides() and (loose := unpaired(*sides(found["rows"], question, stage))) is not None and not loose.decides():
        said += f"; not in pairs {loose.low:+.4f} to {loose.high:+.4f}"
    return said


def _probes(rows: Rows) -> str:
    """How many rows learn each probe."""
    said = []
    for title, learnt, kept, asked in probe_counts(rows):
        said.append(f"{title} by {learnt} of {asked} rows" + (f", kept at four times the length by {kept}" if learnt else ""))
    return f"Learnt at one rate by models of 0.7M parameters: {'; '.join(said)}." if said else ""


def summary(found: dict[str, Any]) -> list[str]:
    """The page's answers, each in a sentence or two."""
    rows = found["rows"]
    items = [_layers(found, "at equal tokens"), _layers(found, "at equal time")]
    items.append(f"Past the training length, to 64 times it, {collapsed(rows)}.")
    cost = [
        said.replace("did not hold, ", "it costs ").replace("held, ", "nothing within 0.01, ").replace("open, ", "not known, ")
        for said in passing(rows)
    ]
    items.append(f"What state passing costs, bits per byte. {'; '.join(cost) or OPEN}.")
    items += [said for said in (ranking(found), longer_answer(found)) if said]
    items.append(f"Muon against AdamW, {muon_tokens(rows)}.")
    items += [said] if (said := _probes(rows)) else []
    items = [in_tokens(item, found) for item in items]
    return [
        line
        for item in items
        for line in textwrap.wrap(f"- {item}", 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    ]


def in_tokens(text: str, found: dict[str, Any]) -> str:
    """The text with a stage's tokens in place of its name."""
    for stage, prefix in PREFIXES.items():
        text = text.replace(prefix.lower(), f"after {found['tokens'][stage] / 1e6:.3g}M tokens: ")
    return text
