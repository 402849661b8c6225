"""The board's page (scripts/board/draw.py): the answers and the leading table first, nulls before the rest; all of it is in details.py."""

from __future__ import annotations

import math
import statistics
from typing import Any

from scripts.board.answers import Answer, answer, bits, questions
from scripts.board.architectures import ARCHITECTURES, counts
from scripts.board.expected import expectation_lines
from scripts.board.longer import longer_table
from scripts.board.order import DECISIVE, DECISIVE_SEEDS, LEADERS, SEEDS, TEN
from scripts.board.results import difference, interval, number
from scripts.board.speedrun import speedrun_lines
from scripts.board.summary import in_tokens, leading, summary, whole
from scripts.board.tables import STAGE_NAMES, behaviour_table, filled, loaded_table, plus_minus, shown_stages, speed_table


def page_text(found: dict[str, Any], pictures: list[str]) -> str:
    """README.md of the page."""
    rows = found["rows"]
    lines = ["# The board", "", *_introduction(found), "", "## Answers, nulls and negative results first", "", *summary(found), ""]
    lines += [*leading_table(found), ""]
    lines += ["![loss](loss.png)", ""] if "loss.png" in pictures else []
    if longer := longer_table(found):
        lines += [f"## {found['tokens']['leaders'] / 1e6:.3g}M tokens", "", *longer, *filled(LONGER), ""]
    lines += ["## Comparisons, nulls and negative results first", "", *comparison_table(found), ""]
    lines += ["## What was expected", "", *(in_tokens(line, found) for line in expectation_lines(rows)), ""]
    if shown_stages(rows) or any(row["probe"] for row in rows.values()):
        lines += ["## Behaviour", "", *behaviour_table(found), ""]
    lines += ["![position](position.png)", ""] if "position.png" in pictures else []
    lines += ["## Speed", "", *speed_table(rows), ""] if any(row["training"] for row in rows.values()) else []
    lines += ["![speed](speed.png)", ""] if "speed.png" in pictures else []
    if found["cards"]:
        lines += ["## Models for transformers", "", *filled(MODELS), ""]
        lines += [f"- [{name.removesuffix('.txt')}](cards/{name})" for name in found["cards"]] + [""]
        lines += [*loaded_table(found["loaded"]), ""] if found["loaded"] else []
    lines += ["## Speedrun", "", *speedrun_lines(found), ""]
    lines += ["## Not run, and what it would take", "", *not_run(found), ""]
    return "\n".join(lines)


LONGER = (
    "Held-out bits per byte of the rows that go on, one seed each, beside the same seed of the full pass; which rows and why is in the "
    "[protocol](protocol.md#350m-tokens). No text is new in the later passes, and no rate was tried at this length. With one seed there is no interval: what lies "
    "below 0.01 is told as no difference. In the second table what the full pass had is in brackets; passkey (50 keys a length, 95 % by Wilson) is of the weights that were kept, in bf16."
)
MODELS = (
    "Exported where they were trained, loaded by transformers alone in a fresh process and compared. The weights, 130 MB each, are not in this "
    "repository: the command in each card makes them again bit for bit, `python -m scripts.board export out=runs/board/again only=CELL` exports "
    "them, and `python -m scripts.push runs/board/again/exported/CELL YOU/NAME` puts them on your Hub."
)


def _introduction(found: dict[str, Any]) -> list[str]:
    rows, tokens = found["rows"], found["tokens"]
    begun, failed = (sum(a["event"] == event for a in found["attempts"]) for event in ("begun", "failed"))
    text = filled(
        f"What each architecture is worth at equal tokens, equal parameters ({found['size'].upper()}, training length {found['T']}) and equal tuning, by a "
        f"[protocol](protocol.md) that was there before the first run, on {', '.join(found['devices'])}. A *hybrid* has three recurrent layers to one "
        "of attention. Drawn by `python -m scripts.board draw` from [cells.jsonl](cells.jsonl); every answer in a sentence, the rates tried and what "
        f"is missing are in [details](details.md), {begun} attempts, of which {failed} failed, in the [log](log.md)."
    )
    stages = shown_stages(rows)
    if not stages:
        return [*text, "", "**No full pass is finished, so nothing below ranks the architectures: the grid has one seed.**"]
    stage, wide = stages[0], len(ARCHITECTURES)
    there, passed = whole(rows, stage), len(whole(rows, "pass"))
    lacking = [ARCHITECTURES[row].label for row in TEN if row not in there]
    said = f"**{len(there)} of the plan's {wide} rows have {SEEDS} seeds or more after {tokens[stage] / 1e6:.3g}M tokens"
    said += f" (of the ten planned first not yet: {'; '.join(lacking)})" if 0 < len(lacking) < len(TEN) else ""
    if stage != "pass":
        said += f"; after the full pass, {tokens['pass'] / 1e6:.3g}M tokens, {passed or 'none'} of them, and it may rank them otherwise"
    said += ".**"
    return [*text, "", *filled(said)]


def leading_table(found: dict[str, Any]) -> list[str]:
    """Every row: bits per byte with the interval over seeds, in each stage that has results, the leading one first and sorted by it; what it is past its
    length, and its speed. Empty where no row has seeds."""
    rows, stages = found["rows"], shown_stages(found["rows"])
    if not stages:
        return ["No cell of the full pass is finished."]
    done = {stage: {name: bits(rows, name, stage) for name in rows} for stage in stages}
    after = " | ".join(f"after {found['tokens'][stage] / 1e6:.3g}M tokens" for stage in stages)
    lines = [
        f"| row | {after} | minus Transformer | past its length | training tokens/s | decoding, 128k |",
        "|---" * (5 + len(stages)) + "|",
    ]

    def place(name: str) -> list[float]:
        return [statistics.fmean(done[stage][name].values() or [math.inf]) for stage in stages]

    for name in sorted((n for n in rows if any(done[stage][n] for stage in stages)), key=place):
        row, cells = rows[name], []
        for stage in stages:
            mean = interval(done[stage][name].values())
            cells.append("" if mean is None else f"{plus_minus(mean, '.4f')} ({mean.n})")
        apart = difference(done[stages[0]][name], done[stages[0]].get("transformer", {})) if name != "transformer" else None
        cells.append("" if apart is None else plus_minus(apart, "+.4f"))
        read = next((s for s in STAGE_NAMES if any(cell["verdict"] for cell in row[s].values())), "")
        cells.append(", ".join(sorted({str(c["verdict"]).split(" (")[0] for c in (row[read].values() if read else []) if c["verdict"]})))
        decode = (row.get("speed", {}).get("decode") or [])[-1:]
        cells += [number(row["training"].get("tokens_per_s"), ",.0f"), number(decode[0]["tokens_per_s"], ",.0f") if decode else ""]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + " |")
    said = (
        f"Held-out bits per byte, 95 % t-interval over so many seeds (least is best). Minus Transformer: at equal seeds, after "
        f"{found['tokens'][stages[0]] / 1e6:.3g}M tokens. Past its length: to 64 times 512 tokens, after the most of these tokens that it was read at. Speeds: alone on the device, training, "
        "and one sequence decoded behind 131,072 tokens."
    )
    said += _rates_of_the_pass(found) if "pass" in stages else ""
    return [*lines, "", *filled(said)]


def _rates_of_the_pass(found: dict[str, Any]) -> str:
    """That the full pass has the rates of stage 1, and how far the best one moved before."""
    each = [[{c["lr"] for c in row[stage].values()} for stage in ("stage0", "stage1")] for row in found["rows"].values()]
    pairs = [(min(before), min(after)) for before, after in each if before and after]  # the cells of a stage that count are of one rate
    moved = [max(one / other, other / one) for one, other in pairs]
    small, large, whole = (f"{found['tokens'][stage] / 1e6:.3g}M" for stage in ("stage0", "stage1", "pass"))
    said = f" After {whole} tokens a row has the rate that was its best after {large}, and was not tuned again"
    return said + (f"; between {small} and {large} the best one of a row moved by up to {max(moved):.0f} times." if moved else ".")


def comparison_table(found: dict[str, Any]) -> list[str]:
    """Each question of the protocol, in the stage of most tokens that has an interval for it; nulls and negative results first."""
    rows, made = found["rows"], list[Answer]()
    for question in questions():
        each = [answer(rows, question, stage) for stage in STAGE_NAMES]
        made += [a for a in each if a.value is not None and a.value.n > 1][:1]
    if not made:
        return ["None yet: nothing has been compared."]
    said = (
        f"Each interval is of 95 %, so of {len(made)} comparisons such as these {len(made) / 20:.1f} miss by chance, on average. Where two rows have "
        "the same seeds it is over pairs, else over all of them. All stages, in sentences: [details](details.md)."
    )
    lines = [*filled(said), "", "| comparison | after | bits per byte | wide | seeds | |", "|---" * 6 + "|"]
    for a in sorted(made, key=lambda a: not a.negative):
        value = a.value
        assert value is not None
        figure = f"{value.mean:+.4f} ({value.low:+.4f} to {value.high:+.4f})"
        verdict = f"**{a.verdict}**" if a.negative else a.verdict
        lines.append(f"| {a.about} | {found['tokens'][a.stage] / 1e6:.3g}M | {figure} | {2 * value.half:.3f} | {value.n} | {verdict} |")
    return lines


def not_run(found: dict[str, Any]) -> list[str]:
    """The stages that have no results, with the cells that they are and the hours of one device, by the speeds measured so far."""
    rows, tokens, size = found["rows"], found["tokens"], found["size"]
    speeds = {name: row["training"].get("tokens_per_s") for name, row in rows.items()}
    known = {name: speed for name, speed in speeds.items() if speed}
    lines = ["| what | cells | hours of one such device |", "|---|---|---|"]

    def entry(what: str, names: list[str], cells: dict[str, int], each: int, dearer: float = 1.0) -> str:
        slowest = min(known.values(), default=math.nan)
        seconds = sum(cells[name] * each * dearer / known.get(name, slowest) for name in names)
        return f"| {what} | {sum(cells[name] for name in names)} | {number(seconds / 3600, '.2g')} |"

    missing = {
        name: max(0, (DECISIVE_SEEDS if name in DECISIVE else SEEDS) - len(rows.get(name, {}).get("pass", {}))) for name in ARCHITECTURES
    }
    ten = {name: max(0, SEEDS - len(rows.get(name, {}).get("pass", {}))) for name in TEN}
    stage, each = leading(rows), f"{tokens['pass'] / 1e6:.3g}M tokens"
    lacking = {name: SEEDS - len(bits(rows, name, stage)) for name in TEN if len(bits(rows, name, stage)) < SEEDS}
    if stage != "pass" and lacking:
        lines.append(
            entry(
                f"the seeds of the ten planned rows that lack them after {tokens[stage] / 1e6:.3g}M tokens",
                list(lacking),
                lacking,
                tokens[stage],
            )
        )
    if any(ten.values()):
        few = [ARCHITECTURES[name].label for name, left in ten.items() if left]
        which = "ten rows" if len(few) > 3 else f"of the ten planned rows {'; '.join(few)}"
        lines.append(entry(f"the full pass, {each}: {which}, {SEEDS} seeds", list(ten), ten, tokens["pass"]))
    if any(missing.values()):
        lines.append(entry(f"the full pass of all {len(ARCHITECTURES)} rows", list(missing), missing, tokens["pass"]))
    named = [name for name in LEADERS if name in rows]
    longer = {name: SEEDS - len(bits(rows, name, "leaders")) for name in named}
    budget = f"{tokens['leaders'] / 1e6:.3g}M tokens"
    if any(left > 0 for left in longer.values()):
        lines.append(entry(f"the leaders on {budget}, {SEEDS} seeds", named, longer, tokens["leaders"]))
    if size == "25m" and named:
        dearer = statistics.fmean(
            counts(n, "125m", found["T"])["training_flops_per_token"] / rows[n]["training_flops_per_token"] for n in named
        )
        what = f"the same {len(named)} at 125M parameters, {budget} (at the same share of the peak)"
        lines.append(entry(what, named, dict.fromkeys(named, SEEDS), tokens["leaders"], dearer))
    said = "Nothing here says what these would show. By the tokens/s above (rows without: the slowest); building, measuring, compiling and rates that are not known yet come on top. Passkey"
    said += " was asked of leaders alone ([cards](#models-for-transformers))." if found["passkey"] else " has not been asked."
    return [*lines, "", *filled(said)]
