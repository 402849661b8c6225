"""The questions of docs/board/protocol.md, answered in sentences from results: differences between equal seeds with their 95 % t-intervals.

A null (an interval that holds zero) and what went against the expectation come first, and are told in the same words as the rest.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from scripts.board.architectures import ARCHITECTURES
from scripts.board.results import Interval, difference, seeds_each, unpaired

Rows = dict[str, dict[str, Any]]  # of scripts/board/draw.py: what was found, by row
PREFIXES = {"pass": "The full pass: ", "stage1": "Stage 1: ", "stage0": "Stage 0: "}  # the one of most tokens first
NARROW = 0.01  # bits per byte that an answer's interval is to be narrower than


@dataclass(frozen=True)
class Question:
    """Whether row `one` has fewer bits per byte than `other`. expected: the sign of one minus other, 0 for none. seeds: which cells of `other`."""

    about: str
    one: str
    other: str
    expected: int
    seeds: str = "pass"


@dataclass(frozen=True)
class Answer:
    """A sentence; negative: whether it is a null or goes against what was expected; known: whether there is a result at all. Of a difference also what it
    is about, its stage, the interval that decides, and what that says in a word or two."""

    text: str
    negative: bool
    known: bool = True
    about: str = ""
    stage: str = ""
    value: Interval | None = None
    verdict: str = ""


def _label(row: str) -> str:
    return ARCHITECTURES[row].label


def questions() -> list[Question]:
    """All pairs that the protocol names, the one nonlinear layer first."""
    made = []
    for row, chosen in sorted(ARCHITECTURES.items(), key=lambda pair: not pair[0].startswith("gdn")):
        if chosen.instead:
            layer, expected = _label(chosen.instead), 0 if chosen.instead == "paragru" else -1
            made.append(Question(f"One layer of {layer} in {_label(chosen.of)}, at equal tokens", row, chosen.of, expected))
            made.append(Question(f"One layer of {layer} in {_label(chosen.of)}, at equal time", row, chosen.of, 1, f"time_of_{row}"))
    for row in ARCHITECTURES:
        base = row.removesuffix("_hybrid")
        if row.endswith("_hybrid"):
            made.append(Question(f"{_label(row)} against {_label(base)}", row, base, -1))
            made.append(Question(f"{_label(row)} against the Transformer", row, "transformer", -1))
    for one, other in (("gdn", "mamba2"), ("mamba2", "paralstm"), ("mamba2", "paragru"), ("deltaproduct", "gdn")):
        made.append(Question(f"{_label(one)} against {_label(other)}", one, other, -1 if one != "deltaproduct" else 0))
    for row, chosen in ARCHITECTURES.items():
        if chosen.initial == "pass":
            made.append(Question(f"State passing in {_label(chosen.of)}", row, chosen.of, 0))
        if chosen.optimizer == "muon" and not chosen.instead:
            made.append(Question(f"Muon against AdamW in the {_label(chosen.of)}", row, chosen.of, -1))
    return made


def bits(rows: Rows, row: str, cells: str) -> dict[int, float]:
    """Held-out bits per byte by seed of a row's cells of one kind, of those that did not diverge."""
    found = rows.get(row, {}).get(cells, {})
    return {int(seed): cell["bits_per_byte"] for seed, cell in found.items() if cell.get("bits_per_byte") is not None}


def shown(value: Interval) -> str:
    """'-0.0123 (-0.0201 to -0.0045, 3 seeds)'."""
    if value.n == 1:
        return f"{value.mean:+.4f} (one seed, so no interval)"
    return f"{value.mean:+.4f} ({value.low:+.4f} to {value.high:+.4f}, {value.n} seeds)"


def sides(rows: Rows, question: Question, stage: str) -> tuple[dict[int, float], dict[int, float]]:
    """Bits per byte by seed of what a question compares in a stage."""
    cells = {"one": stage, "other": stage}
    if question.seeds != "pass":  # equal time: in stage 1, where no more text is there, the slower row reads less
        more = question.seeds.replace("time_", "time0_" if stage == "stage0" else "time_")
        cells |= {"one": "time1"} if stage == "stage1" else {"other": more}
    return bits(rows, question.one, cells["one"]), bits(rows, question.other, cells["other"])


def speed_ratio(rows: Rows, one: str, other: str) -> float | None:
    """Training tokens/s of one row over another's, each alone on the device; None where either was not timed."""
    speeds = [(rows.get(row, {}).get("speed") or {}).get("tokens_per_s") for row in (one, other)]
    return round(speeds[0] / speeds[1], 2) if speeds[0] and speeds[1] else None


def deciding(one: dict[int, float], other: dict[int, float]) -> Interval | None:
    """One minus other over the seeds that both have, or, where one has more of them, over all seeds, not in pairs; None where both have none."""
    paired, every = difference(one, other), unpaired(one, other)
    return every if paired is not None and every is not None and max(len(one), len(other)) > paired.n > 1 else paired


def compared(rows: Rows, question: Question, stage: str) -> Interval | None:
    """`deciding` of a question in a stage."""
    return deciding(*sides(rows, question, stage))


def answer(rows: Rows, question: Question, stage: str = "pass") -> Answer:
    """What the results of a stage, pass, stage1 or stage0, say to a question. In stages 0 and 1 seed 0 chose the rate, so the difference without it is told
    as well."""
    one, other = sides(rows, question, stage)
    about = PREFIXES[stage] + question.about
    found = difference(one, other)
    if found is None:
        if question.seeds != "pass" and (ratio := speed_ratio(rows, question.one, question.other)) is not None and ratio >= 1.0:
            return Answer(f"{about}: it trains at {ratio:.2f} times the speed of the other, so equal tokens are no more time.", False)
        return Answer(f"{about}: not measured yet.", False, False)
    said = f"{about}: {shown(found)} bits per byte"
    if found.n == 1:
        return Answer(f"{said}; nothing can be said.", True)
    if stage != "pass":
        rest = difference({seed: value for seed, value in one.items() if seed}, other)
        said += f"; without seed 0 {shown(rest)}" if rest is not None else ""
    every = deciding(one, other)
    if every is not None and every != found:
        said += (
            f"; over all seeds, not in pairs, {every.mean:+.4f} ({every.low:+.4f} to {every.high:+.4f}, {len(one)} and {len(other)} seeds)"
        )
        found = every
    if not found.decides():
        wide = f"; a difference beyond {max(abs(found.low), abs(found.high)):.4f} is ruled out"
        if found.high - found.low >= NARROW:
            wide = f"; the interval is wider than {NARROW}, so a small difference is not ruled out"
            if found.n > 2:  # two say nothing of how seeds differ
                needed = seeds_each(one, other, NARROW) if found is every else found.seeds_for(NARROW)
                wide += f" (as they differ here, about {needed} seeds{' of each row' if found is every else ''} make it so narrow)"
        return Answer(f"{said}: no difference is shown{wide}.", True, True, question.about, stage, found, "no difference shown")
    better = "better" if found.mean < 0 else "worse"
    against = question.expected != 0 and (found.mean > 0) != (question.expected > 0)
    better += ", against what was expected" if against else ""
    loose = unpaired(one, other)
    better += ", in pairs; not over all seeds" if loose is not None and not loose.decides() and found is not every else ""
    return Answer(f"{said}: {better}.", against or found.mean > 0, True, question.about, stage, found, better)


def beyond_length(rows: Rows, stage: str = "pass") -> list[Answer]:
    """What becomes of each row past its training length."""
    by_verdict: dict[str, list[str]] = {}
    for row, found in rows.items():
        verdicts = sorted({cell["verdict"] for cell in found.get(stage, {}).values() if cell.get("verdict")})
        if verdicts:
            by_verdict.setdefault(" or ".join(verdicts), []).append(_label(row))
    return [
        Answer(
            f"{PREFIXES[stage]}past the training length, 64 times: {'; '.join(names)}: {v}.",
            v != "holds" and not v.startswith("no verdict"),
        )
        for v, names in sorted(by_verdict.items())
    ]


def muon_shares(rows: Rows, stage: str) -> dict[str, list[float]]:
    """Of each Muon row, seed by seed, the share of its tokens after which its training loss is AdamW's at the end (infinite: never). The rate of the run
    falls to the end, so this is an upper bound on the tokens that a run made for that loss would need."""
    shares: dict[str, list[float]] = {}
    for row, chosen in ARCHITECTURES.items():
        if chosen.optimizer != "muon" or chosen.instead:
            continue
        for seed, cell in rows.get(row, {}).get(stage, {}).items():
            other = rows.get(chosen.of, {}).get(stage, {}).get(seed)
            if other and other.get("curve") and cell.get("curve"):
                target = statistics.fmean(loss for _, loss in other["curve"][-5:])
                reached = next((step for step, loss in cell["curve"] if loss <= target), None)
                shares.setdefault(row, []).append(reached / cell["curve"][-1][0] if reached is not None else float("inf"))
    return shares


def tokens_to_equal(rows: Rows, stage: str = "pass") -> list[Answer]:
    """What `muon_shares` found, in sentences."""
    made = []
    for row, shares in muon_shares(rows, stage).items():
        about = f"{PREFIXES[stage]}{_label(ARCHITECTURES[row].of)} with Muon"
        if max(shares) < float("inf"):
            after = f"after {100 * statistics.fmean(shares):.0f} % of the tokens ({len(shares)} seeds)"
            made.append(Answer(f"{about} has AdamW's last training loss {after}.", False))
        else:
            made.append(Answer(f"{about} does not reach AdamW's last training loss in every seed.", True))
    return made


LEARNT = 0.9  # accuracy at the training length from which a probe counts as learnt


PROBES = {"mqar": "MQAR", "parity": "Parity", "word_problems3": "The word problem of S3", "word_problema5": "The word problem of A5"}


def _probed(rows: Rows, task: str) -> tuple[dict[str, tuple[float, float]], list[str], list[str]]:
    """(best accuracy of a seed at the training length and at four times it by row, rows that learn a probe, those that keep it there)."""
    scores = {row: list(found["probe"][task].values()) for row, found in rows.items() if task in found.get("probe", {})}
    best = {row: max((seed[0]["accuracy"], seed[-1]["accuracy"]) for seed in seeds) for row, seeds in scores.items()}
    learnt = [row for row, (first, _) in best.items() if first >= LEARNT]
    return best, learnt, [row for row in learnt if best[row][1] >= LEARNT]


def probe_counts(rows: Rows) -> list[tuple[str, int, int, int]]:
    """(probe, rows that learn it, that keep it at four times the length, that were asked) of each probe that was asked."""
    each = [(title, *_probed(rows, task)) for task, title in PROBES.items()]
    return [(title, len(learnt), len(kept), len(best)) for title, best, learnt, kept in each if best]


def probe_answers(rows: Rows) -> list[Answer]:
    """Of each probe, which rows learn it, and which of those keep it at four times the length."""
    made = []
    for task, name in PROBES.items():
        best, learnt, kept = _probed(rows, task)
        if not best:
            continue
        others = "; ".join(f"{_label(row)} {100 * first:.0f} %" for row, (first, _) in best.items() if row not in learnt)
        said = f"{name}, of {len(best)} rows: " + (f"learnt by {'; '.join(map(_label, learnt))}" if learnt else "learnt by none")
        said += f" (at four times the length too: {'; '.join(map(_label, kept)) or 'none'})" if learnt else ""
        made.append(Answer(said + (f"; not by {others}." if others else "."), not learnt))
    return made


def all_answers(rows: Rows, stage: str = "pass") -> list[Answer]:
    """Nulls and negatives first, then the others, then what is not known, each in the protocol's order."""
    made = [answer(rows, question, stage) for question in questions() if question.one in rows and question.other in rows]
    made += beyond_length(rows, stage) + tokens_to_equal(rows, stage)
    return sorted(made, key=lambda a: (not a.known, not a.negative))
