"""What the protocol expected before any result, and what came out: a line for each expectation, from every stage that can say something.

An expectation of an effect within a bound is held where the 95 % interval lies inside, and refuted where it lies outside; what the interval does not
decide is said to be open, and what has no cells is not answered yet.
"""

from __future__ import annotations

import statistics

from scripts.board.answers import NARROW, PREFIXES, Question, Rows, bits, compared, muon_shares, shown
from scripts.board.architectures import ARCHITECTURES
from scripts.board.longer import before_the_leaders
from scripts.board.results import Interval, interval

OPEN = "not answered yet"
STAGES = tuple(PREFIXES)


def found_in(rows: Rows, question: Question) -> list[tuple[str, Interval]]:
    """(stage, one minus other) of each stage in which both have two seeds in common or more, that of most tokens first."""
    each = [(stage, compared(rows, question, stage)) for stage in STAGES]
    return [(stage, value) for stage, value in each if value is not None and value.n > 1]


def _verdict(value: Interval, low: float, high: float) -> str:
    """'held: -0.0012 (...)', where a difference is expected within low and high."""
    inside, outside = value.low >= low and value.high <= high, value.high < low or value.low > high
    beyond = f"did not hold, {'lower' if value.high < low else 'higher'} than that" if outside else "open"
    return f"{'held' if inside else beyond}, {shown(value)}"


def _said(rows: Rows, one: str, other: str, low: float, high: float) -> str:
    found = found_in(rows, Question("", one, other, 0))
    return "; ".join(f"{PREFIXES[stage].lower()}{_verdict(value, low, high)}" for stage, value in found) or OPEN


def _in_time(rows: Rows, one: str, other: str) -> str:
    """At equal time: that it loses by its speed alone is held where it loses and is within 0.01 of the other row at equal tokens."""
    said = []
    for stage, value in found_in(rows, Question("", one, other, 0, f"time_of_{one}")):
        verdict, equal = _verdict(value, 0.0, 1.0), compared(rows, Question("", one, other, 0), stage)
        if verdict.startswith("held, ") and (equal is None or not _verdict(equal, -0.01, 0.01).startswith("held, ")):
            verdict = verdict.replace("held, ", "it loses; whether by its speed alone is open, as equal tokens do not decide: ")
        said.append(PREFIXES[stage].lower() + verdict)
    return "; ".join(said) or OPEN


def _label(row: str) -> str:
    return ARCHITECTURES[row].label


def _pairs(rows: Rows, pairs: list[tuple[str, str, str, float, float]]) -> list[str]:
    return [f"{about}: {said}" for about, one, other, low, high in pairs if (said := _said(rows, one, other, low, high)) != OPEN]


def collapsed(rows: Rows) -> str:
    """What becomes of the Transformer past its length, and of the others, in the stage of most tokens in which it was read; where a row did better after
    fewer tokens, that too."""
    for stage in STAGES:
        seen = {row: verdict for row in rows if (verdict := _past_length(rows, row, stage))}
        if "transformer" in seen:
            groups: dict[tuple[str, str], list[str]] = {}
            for row, verdict in seen.items():
                if row != "transformer":
                    before = [
                        (s, was) for s in STAGES[STAGES.index(stage) + 1 :] if (was := _past_length(rows, row, s)) not in ("", verdict)
                    ]
                    told = "".join(f"; {PREFIXES[s].lower()}{was}" for s, was in before)
                    groups.setdefault((verdict, told), []).append(_label(row))
            others = [_many(labels, verdict, told) for (verdict, told), labels in sorted(groups.items())]
            rest = f"; of the {len(seen) - 1} others: {', '.join(others)}" if others else ""
            return f"{PREFIXES[stage].lower()}the Transformer {seen['transformer']}{rest}"
    return OPEN


def _past_length(rows: Rows, row: str, stage: str) -> str:
    """The verdict of a row's cells past the training length in a stage, the first of several; empty where it was not read."""
    verdicts = sorted({cell["verdict"] for cell in rows[row].get(stage, {}).values() if cell.get("verdict")})
    return verdicts[0].split(":")[0] if verdicts else ""


def _many(labels: list[str], verdict: str, told: str) -> str:
    """'A; B collapse (0.5 nat; after 25M tokens: degrades)' of rows with one verdict; of those that hold how many they are."""
    if verdict == "holds" and not told:
        return f"{len(labels)} {'holds' if len(labels) == 1 else 'hold'}"
    plural = {"holds": "hold", "degrades": "degrade", "collapses": "collapse"}
    word, _, rest = verdict.partition(" ")
    about = f"{rest.strip('()')}{told}".removeprefix("; ")
    return f"{'; '.join(labels)} {word if len(labels) == 1 else plural.get(word, word)}{f' ({about})' if about else ''}"


def _free(rows: Rows, row: str) -> str:
    """Whether the row costs anything beside the one it is compared with; open where the interval is wide."""
    said = []
    for stage, value in found_in(rows, Question("", row, ARCHITECTURES[row].of, 0)):
        verdict = "did not hold" if value.low > 0 else "held" if value.high - value.low < NARROW else "open"
        said.append(f"{PREFIXES[stage].lower()}{verdict}, {shown(value)}")
    return "; ".join(said)


def muon_tokens(rows: Rows) -> str:
    """After which share of the tokens Muon has AdamW's last training loss, in the stage of most tokens that has both."""
    said = []
    for stage in STAGES:
        for row, shares in muon_shares(rows, stage).items():
            reached = [share for share in shares if share < float("inf")]
            mean = f"after {100 * sum(reached) / len(reached):.0f} % of the tokens" if len(reached) == len(shares) else "not in every seed"
            said.append(f"{_label(ARCHITECTURES[row].of)} {mean}")
        if said:
            return PREFIXES[stage].lower() + "AdamW's last training loss is reached: " + "; ".join(said)
    return OPEN


def passing(rows: Rows) -> list[str]:
    """What state passing costs each row that has it, where that is known."""
    return [f"{_label(row)}: {said}" for row, chosen in ARCHITECTURES.items() if chosen.initial == "pass" and (said := _free(rows, row))]


def before_the_pass(rows: Rows) -> list[tuple[str, list[str]]]:
    """What was expected of the full pass when stage 1 was known, and what came out; empty before a row has both."""
    means = {row: (interval(bits(rows, row, "pass").values()), interval(bits(rows, row, "stage1").values())) for row in rows}
    gains = {row: small.mean - whole.mean for row, (whole, small) in means.items() if whole and small and min(whole.n, small.n) > 1}
    if not gains:
        return []
    within = sum(0.12 <= gain <= 0.18 for gain in gains.values())
    hybrids = {row: bits(rows, row, "pass") for row in ("gdn_hybrid", "gdn_hybrid_paragru", "gdn_hybrid_dense_lstm", "paragru_hybrid")}
    middles = [statistics.fmean(values.values()) for values in hybrids.values() if len(values) > 1]
    apart = [f"{len(middles)} of 4 are there, their means {max(middles) - min(middles):.4f} apart"] if len(middles) > 1 else []
    ahead = [(f"Transformer minus {_label(row)}", "transformer", row, -1.0, 0.0) for row in ("mamba2", "gdn")]
    behind = [(f"{_label(row)} minus Transformer", row, "transformer", 0.07, 1.0) for row in ("paragru", "paralstm")]
    only = {row: {"pass": found["pass"]} for row, found in rows.items()}
    said = f"{within} of {len(gains)} rows: {min(gains.values()):.3f} to {max(gains.values()):.3f}"
    return [
        ("Said of the pass before its first cell: each row is 0.12 to 0.18 below its own 25M tokens", [said]),
        ("Said of the pass before its first cell: the four hybrids within 0.02 of one another", apart),
        ("Said of the pass before its first cell: the Transformer ahead of Mamba-2 and GDN", _pairs(only, ahead)),
        ("Said of the pass before its first cell: ParaGRU and ParaLSTM more than 0.07 behind the Transformer", _pairs(only, behind)),
    ]


def expectations(rows: Rows) -> list[tuple[str, list[str]]]:
    """(what was expected, what came out: one or more sentences), in the protocol's order."""
    layers = [("ParaGRU", "paragru", -0.01, 0.01), ("dense LSTM", "dense_lstm", -0.02, 0.0), ("M2RNN", "m2rnn", -0.02, 0.0)]
    equal = [
        (f"one {name} in {base}{', Muon' if muon else ''}", f"{base}_hybrid_{row}{muon}", f"{base}_hybrid{muon}", low, high)
        for base, muon in (("gdn", ""), ("gdn", "_muon"), ("mamba2", ""))
        for name, row, low, high in layers
        if f"{base}_hybrid_{row}{muon}" in ARCHITECTURES
    ]
    in_time = [f"{about}: {said}" for about, one, other, _, _ in equal if (said := _in_time(rows, one, other)) != OPEN]
    kinds = [row for row in ARCHITECTURES if row.endswith("_hybrid")]
    ahead = [
        (f"{_label(row)} minus {_label(other)}", row, other, -0.03, -0.01)
        for row in kinds
        for other in (row.removesuffix("_hybrid"), "transformer")
    ]
    order = [("GDN minus Mamba-2", "gdn", "mamba2", -1.0, 0.0), ("Mamba-2 minus ParaLSTM", "mamba2", "paralstm", -1.0, 0.0)]
    order.append(("Mamba-2 minus ParaGRU", "mamba2", "paragru", -1.0, 0.0))
    return [
        (
            "One layer of ParaGRU changes the loss by less than 0.01 at equal tokens, one of dense LSTM or M2RNN gains less than 0.02",
            _pairs(rows, equal),
        ),
        ("At equal time it loses, if at all, by its speed alone", in_time),
        ("Hybrids are ahead of their recurrent rows, and of the Transformer, by 0.01 to 0.03", _pairs(rows, ahead)),
        ("Gated DeltaNet is ahead of Mamba-2, Mamba-2 of ParaLSTM and ParaGRU", _pairs(rows, order)),
        ("The Transformer collapses past its length, recurrent rows hold or degrade", [s for s in (collapsed(rows),) if s != OPEN]),
        ("State passing costs nothing within the interval", passing(rows)),
        ("Muon reaches AdamW's final loss with a quarter fewer tokens", [s for s in (muon_tokens(rows),) if s != OPEN]),
        *before_the_pass(rows),
        *before_the_leaders(rows),
    ]


def expectation_lines(rows: Rows) -> list[str]:
    """The page's table of them."""
    lines = ["| expected before any result | what came out, bits per byte |", "|---|---|"]
    return lines + [f"| {expected} | {'<br>'.join(said) or OPEN} |" for expected, said in expectations(rows)]
