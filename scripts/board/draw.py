"""The board's page: table, plots and the log of attempts, drawn from the JSON of the cells.

`draw` takes the cells under OUT into PAGE/cells.jsonl and their attempts into PAGE/attempts.jsonl, and draws the page from those two.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from data.files import write_bytes
from scripts.board.answers import Answer, all_answers, bits
from scripts.board.architectures import ARCHITECTURES, SIZES, WAITING, counts
from scripts.board.plan import BOARDS, PROTOCOL, SEEDS, SPEEDRUN_TARGET, TASKS
from scripts.board.plots import plots
from scripts.board.results import Interval, Result, attempts, difference, gather, interval
from training.errors import UserError


def draw(values: dict[str, Any]) -> None:
    """Writes board.json, README.md, log.md and the plots into the page's folder. Raises UserError where there is nothing to draw."""
    page, out = Path(values["page"]), Path(values["out"])
    every = gather(out, page)
    if not every:
        raise UserError(f"Neither {out} nor {page} has a finished cell; run some first, or give out=.")
    found = collect(values["size"], every, attempts(page))
    pictures = plots(found, page)
    write_bytes(page / "README.md", page_text(found, pictures).encode())
    write_bytes(page / "log.md", log_text(found).encode())
    print(f"{page / 'README.md'}: {len(every)} cells")


def collect(size: str, every: list[Result], log: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page needs of the finished cells of this protocol and size. Raises UserError where they were measured on different texts."""
    board = BOARDS[size]
    results = [r for r in every if _of(r, size)]
    texts = {json.dumps(r.content["settings"]["data"]["held_out"]) for r in results if "data" in r.content["settings"]}
    if len(texts) > 1:
        raise UserError("The cells were measured on different held-out texts; put those of each corpus into a folder of its own.")
    rows: dict[str, dict[str, Any]] = {}
    for name in ARCHITECTURES:
        mine = [r for r in results if r.content["row"] == name]
        if mine:
            rows[name] = {"label": ARCHITECTURES[name].label, **counts(name, size, board.T, board.vocabulary), **_row(mine)}
    devices = sorted({str((r.content.get("environment") or {}).get("device")) for r in every})
    earlier = [
        {
            "label": ARCHITECTURES[r.content["row"]].label,
            "stage": r.content["stage"],
            "protocol": r.content["settings"]["protocol"],
            **_text_cell(r),
        }
        for r in every
        if r.content["settings"]["protocol"] < PROTOCOL and r.content["row"] in ARCHITECTURES and r.bits_per_byte is not None
    ]
    tokens = {"grid": int(0.2 * board.tokens), "pass": board.tokens, "leaders": board.leaders_tokens}
    return {
        "protocol": PROTOCOL,
        "size": size,
        "T": board.T,
        "tokens": tokens,
        "devices": devices,
        "earlier": earlier,
        "rows": rows,
        "attempts": log,
    }


def _of(result: Result, size: str) -> bool:
    settings = result.content.get("settings") or {}
    mine = size if result.content.get("stage") != "probe" else BOARDS[size].probe_size
    width = (settings.get("model") or {}).get("d_model")
    return settings.get("protocol") == PROTOCOL and width == SIZES[mine].d_model


def _row(mine: list[Result]) -> dict[str, Any]:
    row: dict[str, Any] = {"grid": [], "pass": {}, "leaders": {}, "probe": {}, "speedrun": []}
    for result in sorted(mine, key=lambda r: r.name):
        content, settings = result.content, result.content["settings"]
        stage, seed = content["stage"], str(settings["seed"])
        if stage == "grid":
            row["grid"].append({"lr": settings["lr"], "bits_per_byte": result.bits_per_byte, "diverged": result.diverged, **_held(content)})
        elif stage in ("pass", "leaders"):
            row[stage][seed] = _text_cell(result)
        elif stage == "time":
            kind = content["name"].split(".")[0].removeprefix("time_of_")
            row.setdefault(f"time_of_{kind}", {})[seed] = _text_cell(result)
        elif stage == "probe":
            lengths = [{key: r.get(key) for key in ("length", "accuracy", "error")} for r in content["measured"]["lengths"]]
            row["probe"].setdefault(settings["task"]["name"] + settings["task"].get("group", ""), {})[seed] = lengths
        elif stage == "speed":
            chosen = ("tokens_per_s", "mfu", "peak_memory_bytes", "decode", "decode_failed", "graphed")
            row["speed"] = {key: content.get(key) for key in chosen} | {"device": (content.get("environment") or {}).get("device")}
        elif stage == "speedrun":
            words = f"rows={content['row']} speedrun_tokens={content['tokens']} speedrun_lr={settings['lr']:g}"
            command = f"python -m scripts.board run stages=speedrun {words}"
            run = {"seconds": content["seconds"], "tokens": content["tokens"], "lr": settings["lr"], "bits_per_byte": result.bits_per_byte}
            row["speedrun"].append(run | {"command": command})
    row["grid"].sort(key=lambda cell: cell["lr"])
    return row


def _held(content: dict[str, Any]) -> dict[str, Any]:
    held = (content.get("measured") or {}).get("held_out") or {}
    return {
        "low": held.get("low"),
        "high": held.get("high"),
        "seconds": content.get("seconds"),
        "weights_sha256": content.get("weights_sha256"),
    }


def _text_cell(result: Result) -> dict[str, Any]:
    content = result.content
    measured = content.get("measured") or {}
    position, memory = measured.get("position") or {}, measured.get("memory") or {}
    return {
        "bits_per_byte": None if result.diverged else result.bits_per_byte,
        "diverged": result.diverged,
        "lr": content["settings"]["lr"],
        "tokens": content.get("tokens"),
        "stops": content.get("stops"),
        **_held(content),
        "curve": [[step, round(loss, 4)] for step, loss in content.get("curve", []) if loss is not None],
        "verdict": (position.get("collapse") or {}).get("verdict"),
        "buckets": position.get("buckets"),
        "repeated": (measured.get("repeated") or {}).get("gaps"),
        "memory": {key: value.get("tokens") for key, value in memory.items() if isinstance(value, dict)},
    }


# The page


def page_text(found: dict[str, Any], pictures: list[str]) -> str:
    """README.md of the page: negative results first, then the tables."""
    rows, answers = found["rows"], all_answers(found["rows"])
    known = [a for a in answers if a.known]
    lines = ["# The board", "", *_introduction(found), ""]
    lines += [
        "## Nulls and negative results",
        "",
        *(_items([a for a in known if a.negative]) or ["None yet: nothing has been compared."]),
        "",
    ]
    if rest := [a for a in known if not a.negative]:
        lines += ["## What came out otherwise", "", *_items(rest), ""]
    lines += ["## Loss", "", *loss_table(rows), ""]
    lines += ["## Rates tried", "", *grid_table(found), ""]
    lines += ["## Behaviour", "", *behaviour_table(rows), ""] if any(row["pass"] or row["probe"] for row in rows.values()) else []
    lines += ["## Speed", "", *speed_table(rows), ""] if any("speed" in row for row in rows.values()) else []
    for name in pictures:
        lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    lines += ["## Speedrun", "", *speedrun_lines(found), ""]
    if found["earlier"]:
        lines += ["## Under earlier versions of the protocol", "", *earlier_table(found["earlier"]), ""]
    missing = [a for a in answers if not a.known]
    lines += ["## Not known yet", "", *_items(missing), *(f"- {label}: no mixer yet, so no cells." for label in WAITING.values()), ""]
    return "\n".join(lines)


def _items(answers: list[Answer]) -> list[str]:
    return [textwrap.fill(f"- {a.text}", 110, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) for a in answers]


def _introduction(found: dict[str, Any]) -> list[str]:
    rows = found["rows"].values()
    grid, passes = sum(len(row["grid"]) for row in rows), sum(len(row["pass"]) for row in rows)
    begun, failed = (sum(a["event"] == event for a in found["attempts"]) for event in ("begun", "failed"))
    text = [
        f"What each architecture is worth at equal tokens: {found['size']} parameters, training length {found['T']}.",
        "How, and what was expected, is in the [protocol](protocol.md), which was there before the first run.",
        f"Drawn by `python -m scripts.board draw` from [cells.jsonl](cells.jsonl). So far {grid} cells of the rate grid",
        f"({found['tokens']['grid'] / 1e6:g}M tokens, one seed) and {passes} of the full pass ({found['tokens']['pass'] / 1e6:g}M tokens),",
        f"on {', '.join(found['devices'])}. [Every attempt](log.md): {begun} begun, {failed} failed.",
    ]
    text.append("`python -m scripts.board again only=CELL data=DIR` runs a cell once more and compares its bits.")
    warning = "**No full pass is finished, so nothing below ranks the architectures: the grid has one seed.**"
    return [textwrap.fill(" ".join(text), 110, break_long_words=False, break_on_hyphens=False), *([] if passes else ["", warning])]


def _number(value: float | None, form: str) -> str:
    return "" if value is None or not math.isfinite(value) else format(value, form)


def _plus_minus(value: Interval, form: str) -> str:
    return format(value.mean, form) + (f" ± {value.half:.4f}" if value.n > 1 else "")


def loss_table(rows: dict[str, Any]) -> list[str]:
    """The full pass: bits per byte by row with the interval over seeds, and the difference from the Transformer at equal seeds."""
    done = {name: bits(rows, name, "pass") for name in rows}
    if not any(done.values()):
        return ["No cell of the full pass is finished."]
    lines = ["Held-out bits per byte after the full pass, 95 % t-intervals over seeds; differences at equal seeds.", ""]
    lines += ["| row | parameters | FLOPs a token | rate | bits per byte | seeds | minus Transformer |", "|---|---|---|---|---|---|---|"]
    for name in sorted((n for n in done if done[n] or rows[n]["pass"]), key=lambda n: min(done[n].values(), default=math.inf)):
        row, mean = rows[name], interval(done[name].values())
        apart = difference(done[name], done.get("transformer", {})) if name != "transformer" else None
        rates = sorted({cell["lr"] for cell in row["pass"].values()})
        diverged = sum(cell["diverged"] for cell in row["pass"].values())
        value = "" if mean is None else _plus_minus(mean, ".4f")
        seeds = f"{len(done[name])}" + (f", {diverged} diverged" if diverged else "")
        lines.append(
            f"| {row['label']} | {row['parameters'] / 1e6:.2f}M | {row['training_flops_per_token']:.3g} | {', '.join(f'{r:g}' for r in rates)} | {value} | {seeds} | "
            f"{'' if apart is None else _plus_minus(apart, '+.4f')} |"
        )
    return lines


def grid_table(found: dict[str, Any]) -> list[str]:
    """Bits per byte of every rate tried, at a fifth of the pass; the best of a row in bold."""
    rates = sorted({cell["lr"] for row in found["rows"].values() for cell in row["grid"]})
    if not rates:
        return ["No cell of the grid is finished."]
    lines = [
        f"Held-out bits per byte after {found['tokens']['grid'] / 1e6:g}M tokens, seed 0. A best rate at the edge asks for another one.",
        "",
    ]
    lines += ["| row | parameters | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 2) + "|"]
    for row in found["rows"].values():
        values = {cell["lr"]: cell for cell in row["grid"]}
        finite = [c["bits_per_byte"] for c in row["grid"] if not c["diverged"] and c["bits_per_byte"] is not None]
        best = min(finite, default=None)
        texts = []
        for rate in rates:
            cell = values.get(rate)
            text = "" if cell is None else "diverged" if cell["diverged"] else _number(cell["bits_per_byte"], ".4f")
            texts.append(f"**{text}**" if cell and best is not None and cell["bits_per_byte"] == best else text)
        lines.append(f"| {row['label']} | {row['parameters'] / 1e6:.2f}M | " + " | ".join(texts) + " |")
    return lines


def earlier_table(cells: list[dict[str, Any]]) -> list[str]:
    """Cells that do not count any more, each on a line."""
    lines = ["They do not count, and are run again; what changed is at the end of the [protocol](protocol.md#versions).", ""]
    lines += ["| row | stage | version | rate | tokens | bits per byte, 95 % over documents | seconds | stops |", "|---" * 8 + "|"]
    for c in cells:
        value = f"{c['bits_per_byte']:.4f} ({_number(c['low'], '.4f')} to {_number(c['high'], '.4f')})"
        lines.append(
            f"| {c['label']} | {c['stage']} | {c['protocol']} | {c['lr']:g} | {c['tokens'] / 1e6:.1f}M | {value} | {c['seconds']:.1f} | {c['stops']} |"
        )
    return lines


def behaviour_table(rows: dict[str, Any]) -> list[str]:
    """Beyond the training length, copying, memory and probes (median of the seeds; probes: the best seed as well)."""
    names = [task["name"] + task.get("group", "") for task in TASKS.values()]
    lines = ["| row | 64 times the length | copied at once | after T/2 | after 4 T | memory in T, in 8 T | " + " | ".join(TASKS) + " |"]
    lines.append("|---" * (6 + len(names)) + "|")
    for row in rows.values():
        cells = list(row["pass"].values())
        if not cells and not row["probe"]:
            continue
        verdict = ", ".join(sorted({str(cell["verdict"]) for cell in cells if cell["verdict"]}))
        copied = []
        for i in range(3):
            values = sorted(cell["repeated"][i]["copied"] for cell in cells if cell.get("repeated"))
            copied.append(f"{100 * values[len(values) // 2]:.0f} %" if values else "")
        memories = [sorted(c["memory"][key] for c in cells if c.get("memory", {}).get(key) is not None) for key in ("within", "beyond")]
        memory = ", ".join(str(m[len(m) // 2]) for m in memories if m)
        probes = []
        for name in names:
            scores = sorted(
                seed[0]["accuracy"] for seed in row["probe"].get(name, {}).values() if seed and seed[0].get("accuracy") is not None
            )
            probes.append(f"{100 * scores[len(scores) // 2]:.0f} ({100 * scores[-1]:.0f})" if scores else "")
        lines.append(f"| {row['label']} | {verdict} | " + " | ".join([*copied, memory, *probes]) + " |")
    return lines


def speed_table(rows: dict[str, Any]) -> list[str]:
    """Each row alone on the device."""
    lines = ["Alone on the device. Decoding: one sequence, bf16, after 1,024 and after 131,072 tokens.", ""]
    lines += ["| row | training tokens/s | MFU | memory | decode tokens/s, 1k | 128k | state bytes, 1k | 128k | device |", "|---" * 9 + "|"]
    for row in sorted((r for r in rows.values() if "speed" in r), key=lambda r: -r["speed"]["tokens_per_s"]):
        speed = row["speed"]
        decode = [f"{d['tokens_per_s']:,.0f}" for d in (speed.get("decode") or [])] + ["", ""]
        mfu, peak = _number(speed["mfu"] and 100 * speed["mfu"], ".1f"), speed["peak_memory_bytes"]
        memory = f"{peak / 2**30:.1f} GiB" if peak else ""
        lines.append(
            f"| {row['label']} | {speed['tokens_per_s']:,.0f} | {mfu + ' %' if mfu else ''} | {memory} | {decode[0]} | {decode[1]} | "
            f"{row['state_bytes_1k']:,} | {row['state_bytes_128k']:,} | {speed['device']} |"
        )
    return lines


def speedrun_lines(found: dict[str, Any]) -> list[str]:
    """The record, open to be beaten."""
    groups: dict[tuple[str, int, float], list[dict[str, Any]]] = {}
    for row in found["rows"].values():
        for run in row["speedrun"]:
            groups.setdefault((row["label"], run["tokens"], run["lr"]), []).append(run)
    held = []
    for (label, tokens, _), runs in groups.items():
        bits_of_runs = [run["bits_per_byte"] for run in runs]
        if len(runs) >= SEEDS and all(b is not None and b <= SPEEDRUN_TARGET for b in bits_of_runs):
            held.append((statistics.fmean(run["seconds"] for run in runs), label, tokens, bits_of_runs, runs[0]["command"]))
    rule = f"The least time of training on one H100 to {SPEEDRUN_TARGET} bits per byte; rules are in the"
    lines = [rule, "[protocol](protocol.md#the-speedrun).", ""]
    if not held:
        tried = sum(map(len, groups.values()))
        return [*lines, f"There is no record yet; {tried} runs are not enough, or stay above." if tried else "Nobody has run it yet."]
    seconds, label, tokens, every, command = min(held)
    shown = ", ".join(f"{b:.4f}" for b in every)
    return [
        *lines,
        f"{seconds:.1f} s (mean of {len(every)}), {label}, {tokens / 1e6:.1f}M tokens, {shown} bits per byte:",
        "",
        f"    {command}",
    ]


def log_text(found: dict[str, Any]) -> str:
    """log.md: every attempt, in order."""
    lines = ["# Every attempt", "", "Nothing is taken out of this list; a cell that was stopped goes on from where it was.", ""]
    lines += ["| at (UTC) | cell | event | |", "|---|---|---|---|"]
    for a in found["attempts"]:
        about = {k: v for k, v in a.items() if k not in ("at", "cell", "event", "traceback")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items()).replace("|", "/")
        lines.append(f"| {a['at']} | {a['cell']} | {a['event']} | {text} |")
    return "\n".join(lines) + "\n"
