"""The leaders' longer run on the board's page: what more passes over the same text give four rows, beside the same seed of the full pass.

Rows of one seed have no interval; differences below TOLD are not told as differences (docs/board/protocol.md, "350M tokens").
"""

from __future__ import annotations

import statistics
from typing import Any

from scripts.board.answers import Rows, bits
from scripts.board.architectures import ARCHITECTURES
from scripts.board.order import LEADERS, READ0
from scripts.board.results import number

TOLD = 0.01  # bits per byte below which a difference of one seed each is told as none
# What the protocol expected of each row, within EXPECTED_WITHIN: written before the stage's first cell.
EXPECTED = {"gdn_hybrid": 1.155, "paragru_hybrid": 1.160, "gdn": 1.185, "transformer": 1.185}
EXPECTED_WITHIN = 0.03


def seeds_of(rows: Rows) -> dict[str, int]:
    """The seed of each row's cell that is shown: the first of the protocol's that is finished and did not diverge."""
    done = {row: bits(rows, row, "leaders") for row in LEADERS}
    return {row: READ0 if READ0 in seeds else min(seeds) for row, seeds in done.items() if seeds}


def pairs(rows: Rows) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """(cell of the longer run, cell of the full pass with the same seed, None where that did not finish or diverged) by row, least bits per byte first."""
    each = {
        row: (rows[row]["leaders"][str(seed)], rows[row]["pass"][str(seed)] if seed in bits(rows, row, "pass") else None)
        for row, seed in seeds_of(rows).items()
    }
    return dict(sorted(each.items(), key=lambda pair: float(pair[1][0]["bits_per_byte"])))


def end_of(cell: dict[str, Any]) -> float | None:
    """Mean training loss, nats a token, over the last five points of the curve."""
    return statistics.fmean(loss for _, loss in cell["curve"][-5:]) if cell.get("curve") else None


def _difference(value: float) -> str:
    return f"{value:+.4f}" + (", too little for one seed to tell" if abs(value) < TOLD else "")


def longer_answer(found: dict[str, Any]) -> str:
    """The page's sentence of the longer run; empty before there is one."""
    rows = found["rows"]
    each = pairs(rows)
    if not each:
        return ""
    tokens, passes = found["tokens"]["leaders"] / 1e6, found["tokens"]["leaders"] / found["span"]
    shown = "; ".join(
        f"{ARCHITECTURES[row].label} {long['bits_per_byte']:.4f}"
        + (f" ({long['bits_per_byte'] - short['bits_per_byte']:+.3f})" if short else "")
        for row, (long, short) in each.items()
    )
    alone = all(len(bits(rows, row, "leaders")) == 1 for row in each)
    seeds = "one seed each and so no interval" if alone else "one seed of each (the others that are done are in the plot)"
    said = f"Equal tokens, {tokens:.3g}M, {passes:.1f} passes over the same text, {seeds}: {shown}"
    said += f", in brackets what was gained over {found['tokens']['pass'] / 1e6:.3g}M tokens of the same seed."
    if "transformer" in each and len(each) > 1:
        base = each["transformer"]
        apart = [
            f"{ARCHITECTURES[row].label} {_difference(long['bits_per_byte'] - base[0]['bits_per_byte'])}"
            + (f" (after one pass {short['bits_per_byte'] - base[1]['bits_per_byte']:+.4f})" if short and base[1] else "")
            for row, (long, short) in each.items()
            if row != "transformer"
        ]
        said += f" Against the Transformer: {'; '.join(apart)}."
    return said


def longer_table(found: dict[str, Any]) -> list[str]:
    """Loss of the longer run beside the full pass of the same seed, and what else was read off both."""
    each = pairs(found["rows"])
    if not each:
        return []
    long_, short_ = (f"{found['tokens'][stage] / 1e6:.3g}M" for stage in ("leaders", "pass"))
    heads = (
        f"row | seed | rate | {long_} | {short_} | minus Transformer, {long_} | {short_}",
        f"training loss at the end, {long_} | {short_}",
    )
    lines = [f"| {heads[0]} | {heads[1]} | held-out nats a token, {long_} | {short_} |", "|---" * 11 + "|"]
    base = each.get("transformer")
    for row, cells in each.items():
        apart = []
        for i, cell in enumerate(cells):
            other = base[i] if base else None
            apart.append(f"{cell['bits_per_byte'] - other['bits_per_byte']:+.4f}" if cell and other and row != "transformer" else "")
        figures = [number(cell["bits_per_byte"] if cell else None, ".4f") for cell in cells]
        ends = [number(end_of(cell) if cell else None, ".3f") for cell in cells]
        held = [number(cell.get("nats_per_token") if cell else None, ".3f") for cell in cells]
        about = [ARCHITECTURES[row].label, str(seeds_of(found["rows"])[row]), f"{cells[0]['lr']:g}"]
        lines.append(f"| {' | '.join([*about, *figures, *apart, *ends, *held])} |")
    return [*lines, "", *_behaviour(each)]


def _behaviour(each: dict[str, tuple[dict[str, Any], dict[str, Any] | None]]) -> list[str]:
    """Past the length, copying and memory after the longer run, and in brackets after the full pass; passkey of the exported weights."""
    lines = [
        "| row | 64 times the length | copied at once | after T/2 | after 4 T | memory in T, in 8 T | passkey, % at T, at 2 T |",
        "|---" * 7 + "|",
    ]
    for row, (long, short) in each.items():
        both = [(_read(long, key), _read(short, key) if short else "") for key in ("verdict", 0, 1, 2, "memory")]
        texts = [after + (f" ({before})" if before else "") for after, before in both]
        lines.append(f"| {ARCHITECTURES[row].label} | {' | '.join([*texts, _passkey(long)])} |")
    return [*lines, ""]


def _read(cell: dict[str, Any], key: str | int) -> str:
    if isinstance(key, int):
        gaps = cell.get("repeated") or []
        return f"{100 * gaps[key]['copied']:.0f} %" if len(gaps) > key else ""
    if key == "memory":
        return ", ".join(str(value) for value in (cell.get("memory") or {}).values())
    return str(cell.get("verdict") or "").split(" (")[0]


def with_passkey(rows: Rows, passkey: dict[str, Any]) -> None:
    """Puts the scores of `gather_passkey` beside the cells of the longer run that they are of."""
    for name, asked in passkey.items():
        stage, rest = name.split(".", 1)
        row, seed = rest.split(".")[0].partition("@")[0], rest.rsplit(".", 1)[1]
        if stage == "leaders" and seed in rows.get(row, {}).get(stage, {}):
            rows[row][stage][seed]["passkey"] = asked["lengths"]


def _passkey(cell: dict[str, Any]) -> str:
    """Per cent of keys found at the training length and at twice it."""
    return ", ".join(f"{100 * at['accuracy']:.0f} ({100 * at['low']:.0f} to {100 * at['high']:.0f})" for at in cell.get("passkey") or [])


def _judged(so: bool) -> str:
    return "held" if so else "did not hold"


def before_the_leaders(rows: Rows) -> list[tuple[str, list[str]]]:
    """What was expected of the longer run, and what came out; empty before there is a cell."""
    each = pairs(rows)
    if not each:
        return []
    values = {row: float(long["bits_per_byte"]) for row, (long, _) in each.items()}
    near = [
        f"{ARCHITECTURES[row].label} {value:.4f} for {EXPECTED[row]:.3f}: {_judged(abs(value - EXPECTED[row]) <= EXPECTED_WITHIN)}"
        for row, value in values.items()
    ]

    def between(one: str, other: str, low: float, high: float) -> list[str]:
        if not {one, other} <= values.keys():
            return []
        apart = values[one] - values[other]
        return [f"{ARCHITECTURES[one].label} minus {ARCHITECTURES[other].label}: {_judged(low <= apart <= high)}, {apart:+.4f}"]

    ahead = [said for row in ("gdn_hybrid", "paragru_hybrid") for said in between(row, "transformer", -0.035, -0.015)]
    wanted = {"transformer": "collapses", "gdn_hybrid": "collapses", "paragru_hybrid": "collapses", "gdn": "holds"}
    past = [
        f"{ARCHITECTURES[row].label} {verdict}: {_judged(verdict == wanted[row])}"
        for row, (long, _) in each.items()
        if (verdict := _read(long, "verdict"))
    ]
    share = {row: (0.25, 0.40) if row == "gdn" else (0.55, 0.75) for row in values}
    copied = [
        f"{ARCHITECTURES[row].label} {100 * gaps[0]['copied']:.0f} %: {_judged(share[row][0] <= gaps[0]['copied'] <= share[row][1])}"
        for row, (long, _) in each.items()
        if (gaps := long.get("repeated"))
    ]
    found = [
        f"{ARCHITECTURES[row].label} {100 * asked[0]['accuracy']:.0f} %: {_judged(asked[0]['accuracy'] <= 0.1)}"
        for row, (long, _) in each.items()
        if (asked := long.get("passkey"))
    ]
    about = "Said of 350M tokens before their first cell (one seed each): "
    return [
        (f"{about}each row's bits per byte, within {EXPECTED_WITHIN}", near),
        (f"{about}the two hybrids within 0.01 of one another", between("gdn_hybrid", "paragru_hybrid", -0.01, 0.01)),
        (f"{about}both ahead of the Transformer by 0.015 to 0.035", ahead),
        (f"{about}GDN within 0.015 of the Transformer", between("gdn", "transformer", -0.015, 0.015)),
        (f"{about}three with attention collapse past their length, GDN holds", past),
        (f"{about}of a passage read just before 55 to 75 % is saved with attention, 25 to 40 % by GDN", copied),
        (f"{about}passkey at 512 tokens found by none in more than a tenth", found),
    ]
