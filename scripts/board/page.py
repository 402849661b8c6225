"""The words and tables of the board's page (scripts/board/draw.py): answers first, nulls before the rest; what is missing in one table at the end."""

from __future__ import annotations

import math
import statistics
import textwrap
from typing import Any

from scripts.board.answers import Answer, all_answers, bits, probe_answers
from scripts.board.architectures import ARCHITECTURES, WAITING
from scripts.board.expected import expectation_lines
from scripts.board.order import DECISIVE, DECISIVE_SEEDS, SEEDS, TEN
from scripts.board.plan import LEADERS, TASKS
from scripts.board.results import Interval, difference, interval
from scripts.board.speedrun import speedrun_lines
from scripts.board.summary import final_stage, summary

OUTDATED = "they have the steps that earlier speeds asked for, or the rows have not been timed since a step became quicker."
STAGE_NAMES = {"pass": "the full pass", "stage1": "stage 1", "stage0": "stage 0"}
RATES = {"grid": "grid", "stage0": "rates0", "stage1": "rates1"}  # of a stage: where the cells of seed 0 are that choose a rate


def shown_stages(rows: dict[str, Any]) -> list[str]:
    """The stages with seeds that have results, in the order of the page: the one that is whole, then those of more tokens first."""
    there = [stage for stage in STAGE_NAMES if any(bits(rows, name, stage) for name in rows)]
    return sorted(there, key=lambda stage: stage != final_stage(rows))


def page_text(found: dict[str, Any], pictures: list[str]) -> str:
    """README.md of the page: of the stage that is whole negative results first, then the tables; the other stages behind it."""
    rows = found["rows"]
    stages = shown_stages(rows)
    first, others = stages[:1] or ["pass"], stages[1:]
    lines = ["# The board", "", *_introduction(found, stages), "", "## Answered, and not", "", *summary(found), ""]
    front = [a for stage in first for a in all_answers(rows, stage)] + probe_answers(rows)
    lines += ["## Nulls and negative results", "", *_nulls(front), ""]
    if found["outdated"]:
        lines += [*_filled(f"{found['outdated']} cells of equal time are left out: {OUTDATED}"), ""]
    if rest := [a for a in front if a.known and not a.negative]:
        lines += ["## What came out otherwise", "", *_items(rest), ""]
    lines += ["## What was expected", "", *expectation_lines(rows), ""]
    lines += ["## Loss", "", *(["No cell of the full pass is finished.", ""] if "pass" not in stages else [])]
    for stage in first if stages else []:
        lines += [*loss_table(found, stage), ""]
    tried = [line for stage in RATES for line in grid_table(found, stage)]
    lines += ["## Rates tried", "", *(tried or ["No cell of the grid is finished.", ""])]
    if stages or any(row["probe"] for row in rows.values()):
        lines += ["## Behaviour", "", *behaviour_table(rows), ""]
    lines += ["## Speed", "", *speed_table(rows), ""] if any("speed" in row or row["trained"] for row in rows.values()) else []
    for name in pictures:
        lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    lines += ["## Run again", "", *again_table(found), ""] if found["again"] else []
    lines += ["## What a cell costs", "", *cost_lines(found["phases"]), ""] if found["phases"] else []
    lines += ["## Cells side by side", "", *beside_lines(found["beside"]), ""] if found["beside"] else []
    if found["cards"]:
        lines += [
            "## Models for transformers",
            "",
            *_filled(
                "Exported where they were trained, loaded by transformers alone in a fresh process and compared. The weights, 130 MB each, are "
                "not in this repository: the command in each card makes them again bit for bit, `python -m scripts.board export out=runs/board/again only=CELL` "
                "exports them, and `python -m scripts.push runs/board/again/exported/CELL YOU/NAME` puts them on your Hub."
            ),
            "",
        ]
        lines += [f"- [{name.removesuffix('.txt')}](cards/{name})" for name in found["cards"]] + [""]
    lines += ["## Speedrun", "", *speedrun_lines(found), ""]
    for stage in others:
        lines += [f"## {STAGE_NAMES[stage].capitalize()}", "", *loss_table(found, stage), "", *_nulls(all_answers(rows, stage)), ""]
        if rest := [a for a in all_answers(rows, stage) if a.known and not a.negative]:
            lines += ["Otherwise:", "", *_items(rest), ""]
    answers = [a for stage in stages or ["pass"] for a in all_answers(rows, stage)]
    if found["earlier"]:
        lines += ["## Under earlier versions of the protocol", "", *earlier_table(found["earlier"]), ""]
    lines += ["## Not known yet", "", *missing_table(found, answers), ""]
    return "\n".join(lines)


def _nulls(answers: list[Answer]) -> list[str]:
    """The null and negative ones as a list, and of how many comparisons they are."""
    known = [a for a in answers if a.known]
    items = _items([a for a in known if a.negative]) or ["None yet: nothing has been compared."]
    if (compared := sum("bits per byte" in a.text for a in known)) < 2:
        return items
    said = f"Each interval is of 95 %, so of {compared} comparisons such as these {compared / 20:.1f} miss by chance, on average."
    return [*_filled(said), "", *items]


def missing_table(found: dict[str, Any], answers: list[Answer]) -> list[str]:
    """What the board is to have and does not, by stage, and the questions without an answer."""
    rows = found["rows"]

    def whole(stage: str) -> list[str]:
        return [name for name in rows if len(bits(rows, name, stage)) >= SEEDS]

    def lacking(done: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in ARCHITECTURES if name not in done) if done else "all of it"

    wanted = [name for name, row in ARCHITECTURES.items() if (row.optimizer, row.initial) == ("adamw", "zero")]
    entries = [
        (f"{STAGE_NAMES[stage]}, {found['tokens'][stage] / 1e6:.3g}M tokens, {SEEDS} seeds or more", whole(stage)) for stage in STAGE_NAMES
    ]
    entries.append(("speed alone on the device, decoding, memory", [name for name, row in rows.items() if "speed" in row]))
    lines = ["| what | rows done | missing |", "|---|---|---|"]
    lines += [f"| {what} | {len(done)} of {len(ARCHITECTURES)} | {lacking(done)} |" for what, done in entries]
    for title, task in TASKS.items():
        probed = [name for name, row in rows.items() if task["name"] + task.get("group", "") in row["probe"]]
        missing = ", ".join(f"`{name}`" for name in wanted if name not in probed) if probed else "all of it"
        lines.append(f"| probe: {title} | {len(probed)} of {len(wanted)} | {missing} |")
    leaders = sum(bool(row["leaders"]) for row in rows.values())
    lines.append(
        f"| the four leaders on {found['tokens']['leaders'] / 1e6:g}M tokens; 125M parameters{'' if found['passkey'] else '; passkey'} | {leaders} of 4 | {'' if leaders else 'all of it'} |"
    )
    lines += [f"| {label} | 0 | no mixer yet, so no cells |" for label in WAITING.values()]
    if said := hours_left(found):
        lines += ["", *_filled(said)]
    if unanswered := list(dict.fromkeys(a.text.removesuffix(": not measured yet.") for a in answers if not a.known)):
        lines += ["", "Questions of which one side is measured and the other is not:", ""]
        lines += _items([Answer(text, False) for text in unanswered])
    return lines


def hours_left(found: dict[str, Any]) -> str:
    """What the grid, the full pass and the leaders still take, by the speeds measured so far; empty where there is none."""
    rows, tokens = found["rows"], found["tokens"]
    speeds = {name: (row.get("speed") or row["trained"] or {}).get("tokens_per_s") for name, row in rows.items()}
    known = {name: speed for name, speed in speeds.items() if speed}
    if not known:
        return ""
    slowest, seconds = min(known.values()), 0.0
    for name in ARCHITECTURES:
        seeds, row = DECISIVE_SEEDS if name in DECISIVE else SEEDS, rows.get(name, {})
        rates = 0 if row.get("settled") else max(0, 3 - len(row.get("grid", [])))  # the pass takes stage 1's rate where it is known
        left = rates * tokens["grid"] + max(0, seeds - len(row.get("pass", {}))) * tokens["pass"]
        seconds += left / known.get(name, slowest)
    leaders = LEADERS * SEEDS * tokens["leaders"] / statistics.median(known.values())
    return (
        f"By the tokens/s above (rows without: the slowest), the rate grid and the full pass of all {len(ARCHITECTURES)} rows still take "
        f"{seconds / 3600:.1f} hours of one such device, and {LEADERS} leaders with {SEEDS} seeds {leaders / 3600:.1f}; building, measuring and "
        "compiling come on top."
    )


def again_table(found: dict[str, Any]) -> list[str]:
    """Cells that were run a second time from their command."""
    lines = ["| cell | version | bits | stops, first and second time | code, first and second time | device |", "|---" * 6 + "|"]
    for run in sorted(found["again"], key=lambda run: -run["protocol"]):
        codes = ", ".join(code or "before sums were ordered" for code in run.get("code") or [None, None])
        same = "the same" if not run["differ"] else "**different**: " + ", ".join(run["differ"])
        lines.append(f"| {run['name']} | {run['protocol']} | {same} | {run['stops_before']}, {run['stops']} | {codes} | {run['device']} |")
    stages = [c for row in found["rows"].values() for stage in ("stage0", "stage1") for c in row[stage].values()]
    if before := sum(not c["code"] for c in stages):
        lines += [
            "",
            f"{before} cells of the stages were trained before sums were strictly ordered: the numbers of those with attention count, but",
        ]
        lines += ["their bits do not repeat ([protocol](protocol.md#running-again))."]
    if loose := sorted({row["label"] for row in found["rows"].values() for c in row["stage0"].values() if c["unordered"]}):
        lines += ["", f"Operations without an order, so that bits need not repeat: {', '.join(loose)}."]
    return lines


def cost_lines(phases: list[dict[str, Any]]) -> list[str]:
    """Median seconds of the parts of a cell by its tokens."""
    lines = ["| tokens | cells | build | train | hash | measure |", "|---|---|---|---|---|---|"]
    for tokens in sorted({p["tokens"] for p in phases}):
        mine = [p for p in phases if p["tokens"] == tokens]
        if len(mine) > 2:
            medians = [f"{statistics.median(p[key] for p in mine):.2f}" for key in ("build", "train", "hash", "measure")]
            lines.append(f"| {tokens / 1e6:.3g}M | {len(mine)} | " + " | ".join(medians) + " |")
    return ["Median seconds of cells that had the device alone; the first one of a process compiles kernels in its training.", "", *lines]


def beside_lines(beside: dict[str, Any]) -> list[str]:
    """What `python -m scripts.board beside` found: tokens/s of several cells of a row on one device together."""
    most = max(len(rates) for rates in beside["rows"].values())
    where = f"{beside['environment']['device']}, commit {beside['environment']['commit'][:7]}, [JSON](beside.json)"
    lines = _filled(
        "Training tokens/s of so many cells of a row together on one device, each a graph on a stream of its own, and their ratio to "
        f"one alone ({where})."
    )
    lines += ["", "| row | " + " | ".join(str(n) for n in range(1, most + 1)) + " |", "|---" * (most + 1) + "|"]
    for row, rates in beside["rows"].items():
        lines.append(f"| {ARCHITECTURES[row].label} | " + " | ".join(f"{r:,.0f} ({r / rates[0]:.2f})" for r in rates) + " |")
    return lines


def _items(answers: list[Answer]) -> list[str]:
    return [textwrap.fill(f"- {a.text}", 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for a in answers]


def _filled(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def _introduction(found: dict[str, Any], stages: list[str]) -> list[str]:
    rows, tokens = found["rows"].values(), found["tokens"]
    grid, passes = sum(len(row["grid"]) for row in rows), sum(len(row["pass"]) for row in rows)
    zero = sum(len(row["rates0"]) + sum(seed != "0" for seed in row["stage0"]) for row in rows)
    one = sum(len(row["rates1"]) + sum(seed != "0" for seed in row["stage1"]) for row in rows)
    begun, failed = (sum(a["event"] == event for a in found["attempts"]) for event in ("begun", "failed"))
    text = [
        f"What each architecture is worth at equal tokens: {found['size']} parameters, training length {found['T']}.",
        "How, and what was expected, is in the [protocol](protocol.md), which was there before the first run.",
        f"Drawn by `python -m scripts.board draw` from [cells.jsonl](cells.jsonl). So far {zero} cells of stage 0",
        f"({tokens['stage0'] / 1e6:g}M tokens), {one} of stage 1 ({tokens['stage1'] / 1e6:.0f}M tokens), {grid} of the rate grid",
        f"({tokens['grid'] / 1e6:g}M tokens, one seed) and {passes} of the full pass ({tokens['pass'] / 1e6:g}M tokens),",
        f"on {', '.join(found['devices'])}. [Every attempt](log.md): {begun} begun, {failed} failed.",
    ]
    text.append("`python -m scripts.board again only=CELL data=DIR` runs a cell once more and compares its bits.")
    shares = " and ".join(f"{tokens[s] / tokens['pass']:.0%} of its tokens ({STAGE_NAMES[s]})" for s in stages if s != "pass")
    warning = (
        f"**No cell of the full pass is finished. What is below was trained on {shares} and does not rank what the full pass is for.**"
    )
    final = final_stage(found["rows"])
    complete = [row for row in found["rows"] if len(bits(found["rows"], row, final)) >= SEEDS]
    if set(TEN) <= set(complete) and final != "pass":
        warning = (
            f"**The table is that of {STAGE_NAMES[final]}: {len(complete)} rows with {SEEDS} seeds or more, {tokens[final] / 1e6:.3g}M tokens a cell, "
            f"{tokens[final] / tokens['pass']:.0%} of the full pass, which was not run: the device time that there was did not reach so far. It says "
            "how fast each row learns at first.**"
        )
        if others := [s for s in stages if s != final]:
            warning += " " + " and ".join(f"{STAGE_NAMES[s].capitalize()} is of {tokens[s] / 1e6:.3g}M tokens" for s in others) + "."
    if not stages:
        warning = "**No full pass is finished, so nothing below ranks the architectures: the grid has one seed.**"
    warning = textwrap.fill(warning, 110)
    return [textwrap.fill(" ".join(text), 110, break_long_words=False, break_on_hyphens=False), *([] if passes else ["", warning])]


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def _plus_minus(value: Interval, form: str) -> str:
    return format(value.mean, form) + (f" ± {value.half:.4f}" if value.n > 1 else "")


def loss_table(found: dict[str, Any], stage: str) -> list[str]:
    """A stage: bits per byte by row with the interval over seeds, and the difference from the Transformer at equal seeds."""
    rows = found["rows"]
    done = {name: bits(rows, name, stage) for name in rows}
    lines = [
        f"After {STAGE_NAMES[stage]} ({found['tokens'][stage] / 1e6:.3g}M tokens): held-out bits per byte, 95 % t-intervals over seeds;",
        "differences at equal seeds.",
        "",
        *([*_filled(told), ""] if (told := standing(found, stage)) else []),
        "| row | parameters | FLOPs a token | rate | bits per byte | seeds | minus Transformer |",
        "|---" * 7 + "|",
    ]
    for name in sorted((n for n in done if done[n] or rows[n][stage]), key=lambda n: statistics.fmean(done[n].values() or [math.inf])):
        row, mean = rows[name], interval(done[name].values())
        apart = difference(done[name], done.get("transformer", {})) if name != "transformer" else None
        rates = sorted({cell["lr"] for cell in row[stage].values()})
        diverged = sum(cell["diverged"] for cell in row[stage].values())
        value = "" if mean is None else _plus_minus(mean, ".4f")
        seeds = f"{len(done[name])}" + (f", {diverged} diverged" if diverged else "")
        lines.append(
            f"| {row['label']} | {row['parameters'] / 1e6:.2f}M | {row['training_flops_per_token']:.3g} | {', '.join(f'{r:g}' for r in rates)} | {value} | {seeds} | "
            f"{'' if apart is None else _plus_minus(apart, '+.4f')} |"
        )
    return lines


def grid_table(found: dict[str, Any], stage: str) -> list[str]:
    """Bits per byte of every rate tried with seed 0, in the grid of the full pass or a stage; the best of a row in bold. Empty where there is none."""
    rates = sorted({cell["lr"] for row in found["rows"].values() for cell in row[RATES[stage]]})
    if not rates:
        return []
    where = STAGE_NAMES.get(stage, "the grid")
    lines = [
        f"Held-out bits per byte in {where}, after {found['tokens'][stage] / 1e6:.3g}M tokens, seed 0. A best rate at the edge asks for another one.",
        "",
    ]
    lines += ["| row | parameters | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 2) + "|"]
    for row in found["rows"].values():
        if not row[RATES[stage]]:
            continue
        values = {cell["lr"]: cell for cell in row[RATES[stage]]}
        finite = [c["bits_per_byte"] for c in row[RATES[stage]] if not c["diverged"] and c["bits_per_byte"] is not None]
        best = min(finite, default=None)
        texts = []
        for rate in rates:
            cell = values.get(rate)
            text = "" if cell is None else "diverged" if cell["diverged"] else cell["behind"] or _number(cell["bits_per_byte"], ".4f")
            texts.append(f"**{text}**" if cell and best is not None and cell["bits_per_byte"] == best else text)
        lines.append(f"| {row['label']} | {row['parameters'] / 1e6:.2f}M | " + " | ".join(texts) + " |")
    return [*lines, ""]


def earlier_table(cells: list[dict[str, Any]]) -> list[str]:
    """Cells that do not count any more, those of one row, stage and rate on a line; each of them is in cells.jsonl."""
    lines = ["They do not count; what changed is at the end of the [protocol](protocol.md#versions).", ""]
    lines += ["| row | stage | version | rate | tokens | cells | bits per byte, mean (least to most) |", "|---" * 7 + "|"]
    groups: dict[tuple[Any, ...], list[float]] = {}
    for c in cells:
        stage = c["stage"].split("_of_")[0]
        groups.setdefault((c["label"], stage, c["protocol"], c["lr"], c["tokens"]), []).append(c["bits_per_byte"])
    for (label, stage, version, lr, tokens), found in groups.items():
        spread = f" ({min(found):.4f} to {max(found):.4f})" if len(found) > 1 else ""
        mean = f"{statistics.fmean(found):.4f}{spread}"
        lines.append(f"| {label} | {stage} | {version} | {lr:g} | {tokens / 1e6:.1f}M | {len(found)} | {mean} |")
    return lines


def behaviour_table(rows: dict[str, Any]) -> list[str]:
    """Beyond the training length, copying, memory and probes, of the stage of most tokens in which a row was read (median of the seeds; probes: the
    best seed as well)."""
    names = [task["name"] + task.get("group", "") for task in TASKS.values()]
    lines = [
        "| row | read after | 64 times the length | copied at once | after T/2 | after 4 T | memory in T, in 8 T | "
        + " | ".join(TASKS)
        + " |"
    ]
    lines.append("|---" * (7 + len(names)) + "|")
    unread, unprobed = [], []
    for row in rows.values():
        stage = next((stage for stage in STAGE_NAMES if any(cell["verdict"] for cell in row[stage].values())), "")
        cells = list(row[stage].values()) if stage else []
        unread += [] if stage else [row["label"]]
        unprobed += [] if row["probe"] else [row["label"]]
        if not row["probe"] and not stage:
            continue
        verdict = ", ".join(sorted({str(cell["verdict"]).split(":")[0] for cell in cells if cell["verdict"]}))
        copied = []
        for i in range(3):
            values = sorted(cell["repeated"][i]["copied"] for cell in cells if len(cell.get("repeated") or []) > i)
            copied.append(f"{100 * values[len(values) // 2]:.0f} %" if values else "")
        memories = [sorted(c["memory"][key] for c in cells if c.get("memory", {}).get(key) is not None) for key in ("within", "beyond")]
        memory = ", ".join(str(m[len(m) // 2]) for m in memories if m)
        probes = []
        for name in names:
            seeds = [seed for seed in row["probe"].get(name, {}).values() if seed and seed[0].get("accuracy") is not None]
            ends = [sorted(100 * seed[end]["accuracy"] for seed in seeds) for end in (0, -1)]
            best = f" ({ends[0][-1]:.0f})" if len(seeds) > 1 else ""
            probes.append(f"{ends[0][len(seeds) // 2]:.0f}{best}, {ends[1][len(seeds) // 2]:.0f}" if seeds else "")
        lines.append(f"| {row['label']} | {STAGE_NAMES.get(stage, '')} | {verdict} | " + " | ".join([*copied, memory, *probes]) + " |")
    why = ["More than the loss is read off every cell of the full pass and off seed 1 of the other stages. Probes: per cent right at the"]
    why += [
        "training length, and at four times it; of several seeds the median (the best). Parity is asked at every place and guessing has"
    ]
    why += ["half of it, so 62 at four times the length is what learning the training length alone gives. What is empty had no time yet."]
    why += [f"Not read yet: {'; '.join(unread)}."] if unread else []
    why += ["No row has had its probes."] if len(unprobed) == len(rows) else [f"Without probes: {'; '.join(unprobed)}."] if unprobed else []
    return [*lines, "", *_filled(" ".join(why))]


def speed_table(rows: dict[str, Any]) -> list[str]:
    """Each row alone on the device; state bytes, which are reckoned, of all of them."""
    lines = ["Alone on the device. Decoding: one sequence, bf16, after 1,024 and after 131,072 tokens. State bytes are reckoned.", ""]
    lines += ["| row | training tokens/s | MFU | memory | decode tokens/s, 1k | 128k | state bytes, 1k | 128k | device |", "|---" * 9 + "|"]
    starred = False
    untimed: list[str] = []
    for row in sorted(rows.values(), key=lambda r: -float((r.get("speed") or r["trained"] or {}).get("tokens_per_s", 0.0))):
        speed = row.get("speed") or row["trained"] or {}
        star = " *" if speed and "speed" not in row else ""
        starred = starred or bool(star)
        untimed += [] if "speed" in row else [row["label"]]
        decode = [f"{d['tokens_per_s']:,.0f}" for d in (speed.get("decode") or [])] + ["", ""]
        mfu, peak = _number(speed.get("mfu") and 100 * speed["mfu"], ".1f"), speed.get("peak_memory_bytes")
        lines.append(
            f"| {row['label']} | {_number(speed.get('tokens_per_s'), ',.0f')}{star} | {mfu + ' %' if mfu else ''} | "
            f"{f'{peak / 2**30:.1f} GiB' if peak else ''} | {decode[0]} | {decode[1]} | "
            f"{row['state_bytes_1k']:,} | {row['state_bytes_128k']:,} | {speed.get('device', '')} |"
        )
    why = ["* of the row's own cells, which had the device alone (median)."] if starred else []
    why += [f"Not timed by the stage speed yet, so without decoding and memory: {'; '.join(untimed)}."] if untimed else []
    return [*lines, *(["", *_filled(" ".join(why))] if why else [])]


def standing(found: dict[str, Any], stage: str) -> str:
    """The rows of a stage with SEEDS seeds or more, the best first, in a sentence; empty of fewer than two."""
    rows = found["rows"]
    means = {name: statistics.fmean(values.values()) for name in rows if len(values := bits(rows, name, stage)) >= SEEDS}
    order = sorted(means, key=means.__getitem__)
    if len(order) < 2:
        return ""
    named = [f"{rows[name]['label']} {means[name]:.4f}" for name in order]
    return f"Of {len(order)} rows with {SEEDS} seeds or more, the least bits per byte first: {'; '.join(named)}."


def log_text(found: dict[str, Any]) -> str:
    """log.md: every attempt, in order."""
    lines = ["# Every attempt", "", "Nothing is taken out of this list; a cell that was stopped goes on from where it was.", ""]
    lines += ["| at (UTC) | cell | event | |", "|---|---|---|---|"]
    for a in found["attempts"]:
        about = {k: v for k, v in a.items() if k not in ("at", "cell", "event", "traceback")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items()).replace("|", "/")
        lines.append(f"| {a['at']} | {a['cell']} | {a['event']} | {text} |")
    return "\n".join(lines) + "\n"
