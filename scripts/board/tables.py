"""The tables of the board's page (scripts/board/page.py, details.py): loss, rates, behaviour, speed, and what cells and their repetition cost."""

from __future__ import annotations

import math
import statistics
import textwrap
from typing import Any

from scripts.board.answers import bits
from scripts.board.architectures import ARCHITECTURES
from scripts.board.cells import TASKS
from scripts.board.results import Interval, difference, interval, number
from scripts.board.summary import leading

STAGE_NAMES = {"pass": "the full pass", "stage1": "stage 1", "stage0": "stage 0"}
RATES = {"grid": "grid", "stage0": "rates0", "stage1": "rates1"}  # of a stage: where the cells of seed 0 are that choose a rate


def shown_stages(rows: dict[str, Any]) -> list[str]:
    """The stages with seeds that have results, in the order of the page: the leading one, then those of more tokens first."""
    there = [stage for stage in STAGE_NAMES if any(bits(rows, name, stage) for name in rows)]
    return sorted(there, key=lambda stage: stage != leading(rows))


def filled(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def plus_minus(value: Interval, form: str) -> str:
    return format(value.mean, form) + (f" ± {value.half:.4f}" if value.n > 1 else "")


def loss_table(found: dict[str, Any], stage: str) -> list[str]:
    """A stage: bits per byte by row with the interval over seeds, and the difference from the Transformer at equal seeds."""
    rows = found["rows"]
    done = {name: bits(rows, name, stage) for name in rows}
    lines = [
        f"After {STAGE_NAMES[stage]} ({found['tokens'][stage] / 1e6:.3g}M tokens): held-out bits per byte, 95 % t-intervals over seeds;",
        "differences at equal seeds.",
        "",
        "| row | parameters | FLOPs a token | rate | bits per byte | seeds | minus Transformer |",
        "|---" * 7 + "|",
    ]
    for name in sorted((n for n in done if done[n] or rows[n][stage]), key=lambda n: statistics.fmean(done[n].values() or [math.inf])):
        row, mean = rows[name], interval(done[name].values())
        apart = difference(done[name], done.get("transformer", {})) if name != "transformer" else None
        rates = sorted({cell["lr"] for cell in row[stage].values()})
        diverged = sum(cell["diverged"] for cell in row[stage].values())
        value = "" if mean is None else plus_minus(mean, ".4f")
        seeds = f"{len(done[name])}" + (f", {diverged} diverged" if diverged else "")
        lines.append(
            f"| {row['label']} | {row['parameters'] / 1e6:.2f}M | {row['training_flops_per_token']:.3g} | {', '.join(f'{r:g}' for r in rates)} | {value} | {seeds} | "
            f"{'' if apart is None else plus_minus(apart, '+.4f')} |"
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
            text = "" if cell is None else "diverged" if cell["diverged"] else cell["behind"] or number(cell["bits_per_byte"], ".4f")
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


def behaviour_table(found: dict[str, Any]) -> list[str]:
    """Beyond the training length, copying, memory and probes, of the stage of most tokens in which a row was read (median of the seeds; probes: the
    best seed as well)."""
    rows, names = found["rows"], [task["name"] + task.get("group", "") for task in TASKS.values()]
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
        read = f"{found['tokens'][stage] / 1e6:.3g}M tokens" if stage else ""
        lines.append(f"| {row['label']} | {read} | {verdict} | " + " | ".join([*copied, memory, *probes]) + " |")
    why = ["More than the loss is read off seed 1 of a row in each stage. Probes: per cent right at the"]
    why += [
        "training length, and at four times it; of several seeds the median (the best). Parity is asked at every place and guessing has"
    ]
    why += ["half of it, so 62 at four times the length is what learning the training length alone gives. What is empty had no time yet."]
    why += [f"Not read yet: {'; '.join(unread)}."] if unread else []
    why += ["No row has had its probes."] if len(unprobed) == len(rows) else [f"Without probes: {'; '.join(unprobed)}."] if unprobed else []
    return [*lines, "", *filled(" ".join(why))]


def speed_table(rows: dict[str, Any]) -> list[str]:
    """Each row alone on the device; state bytes, which are reckoned, of all of them."""
    lines = ["Alone on the device. Decoding: one sequence, bf16, after 1,024 and after 131,072 tokens. State bytes are reckoned.", ""]
    lines += ["| row | training tokens/s | MFU | memory | decode tokens/s, 1k | 128k | state bytes, 1k | 128k | device |", "|---" * 9 + "|"]
    starred = False
    untimed: list[str] = []
    for row in sorted(rows.values(), key=lambda r: -float(r["training"].get("tokens_per_s", 0.0))):
        speed, training = row.get("speed", {}), row["training"]
        star = " *" if training.get("own") else ""
        starred = starred or bool(star)
        untimed += [] if "speed" in row else [row["label"]]
        decode = [f"{d['tokens_per_s']:,.0f}" for d in (speed.get("decode") or [])] + ["", ""]
        mfu, peak = number(training.get("mfu") and 100 * training["mfu"], ".1f"), speed.get("peak_memory_bytes")
        lines.append(
            f"| {row['label']} | {number(training.get('tokens_per_s'), ',.0f')}{star} | {mfu + ' %' if mfu else ''} | "
            f"{f'{peak / 2**30:.1f} GiB' if peak else ''} | {decode[0]} | {decode[1]} | "
            f"{row['state_bytes_1k']:,} | {row['state_bytes_128k']:,} | {training.get('device', '')} |"
        )
    why = (
        ["* of the row's own cells, those of the full pass where it has some (median); the others by the stage speed, with older kernels."]
        if starred
        else []
    )
    why += [f"Not timed by the stage speed yet, so without decoding and memory: {'; '.join(untimed)}."] if untimed else []
    return [*lines, *(["", *filled(" ".join(why))] if why else [])]


def loaded_table(loaded: dict[str, dict[str, Any]]) -> list[str]:
    """Exported folders as transformers loaded them where they were made, beside our own model on the same held-out windows."""
    lines = [
        "| folder | transformers | windows | nats a token, loaded by transformers | by our own code | largest difference of a token |",
        "|---" * 6 + "|",
    ]
    for name, about in sorted(loaded.items()):
        nats = [f"{about[f'nats_per_token_{who}']:.5f}" for who in ("transformers", "ours")]
        windows = f"{about['windows']} of {about['of_tokens']} tokens, {about['device'].upper()}"
        lines.append(
            f"| {name} | {about['transformers']} | {windows} | {' | '.join(nats)} | {about['largest_difference_of_a_token']:.1e} |"
        )
    return lines


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
    lines = filled(
        "Training tokens/s of so many cells of a row together on one device, each a graph on a stream of its own, and their ratio to "
        f"one alone ({where})."
    )
    lines += ["", "| row | " + " | ".join(str(n) for n in range(1, most + 1)) + " |", "|---" * (most + 1) + "|"]
    for row, rates in beside["rows"].items():
        lines.append(f"| {ARCHITECTURES[row].label} | " + " | ".join(f"{r:,.0f} ({r / rates[0]:.2f})" for r in rates) + " |")
    return lines
