"""The board's page: table, plots and the log of attempts, drawn from the JSON of the cells.

`draw` takes the cells under OUT into PAGE/cells.jsonl and their attempts into PAGE/attempts.jsonl, and draws the page from those two.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from data.files import write_bytes
from scripts.board.architectures import ARCHITECTURES, SIZES, counts, update_of
from scripts.board.cells import BOARDS, PROTOCOL, Board, tokens_of
from scripts.board.details import details_text, log_text
from scripts.board.longer import with_passkey
from scripts.board.page import page_text
from scripts.board.plots import plots
from scripts.board.rates import MOST_RATES, said
from scripts.board.results import Result, attempts, final_loss, gather, gather_again, gather_loaded, gather_passkey
from scripts.board.tables import RATES
from training.cost.flops import peak_flops
from training.errors import UserError


def draw(values: dict[str, Any]) -> None:
    """Writes README.md, details.md, log.md and the plots into the page's folder. Raises UserError where there is nothing to draw."""
    page, out = Path(values["page"]), Path(values["out"])
    every = gather(out, page)
    if not every:
        raise UserError(f"Neither {out} nor {page} has a finished cell; run some first, or give out=.")
    found = collect(values["size"], every, attempts(page)) | {"again": gather_again(out, page, every)}
    if (out / "beside.json").exists():
        write_bytes(page / "beside.json", (out / "beside.json").read_bytes())
    if (page / "beside.json").exists():
        found["beside"] = json.loads((page / "beside.json").read_text())
    for card in sorted((out / "cards").glob("*.md")):
        write_bytes(page / "cards" / f"{card.stem}.txt", card.read_bytes())
    cards = sorted((page / "cards").glob("*.txt"))
    found |= {"cards": [path.name for path in cards], "passkey": gather_passkey(out, page), "loaded": gather_loaded(out, page)}
    with_passkey(found["rows"], found["passkey"])
    pictures = plots(found, page)
    write_bytes(page / "README.md", page_text(found, pictures).encode())
    write_bytes(page / "details.md", details_text(found).encode())
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
    for row in rows.values():
        row["training"] = _training(row)
    outdated = sum(_drop_other_times(rows, name, board) for name in rows)
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
    tokens = {stage: tokens_of(board, stage) for stage in ("stage0", "stage1", "grid", "pass", "leaders")}
    # The leaders' cells shared their devices with programs that their results do not know of (protocol.md).
    timed = [r for r in results if "phases" in r.content and r.content["stage"] != "leaders" and not said(r.content)]
    alone = [r for r in timed if r.content.get("beside", 1) == 1]
    phases = [r.content["phases"] | {"tokens": r.content["tokens"]} for r in alone]
    return {
        "protocol": PROTOCOL,
        "size": size,
        "T": board.T,
        "tokens": tokens,
        "devices": devices,
        "earlier": earlier,
        "rows": rows,
        "attempts": log,
        "phases": phases,
        "outdated": outdated,
        "again": [],
        "beside": {},
        "cards": [],
        "passkey": {},
        "loaded": {},
        "span": board.span,
    }


def _of(result: Result, size: str) -> bool:
    settings = result.content.get("settings") or {}
    mine = size if result.content.get("stage") != "probe" else BOARDS[size].probe_size
    width = (settings.get("model") or {}).get("d_model")
    same = settings.get("orthogonalised") == update_of(settings.get("optimizer", "")).get("orthogonalised")
    return same and settings.get("protocol") == PROTOCOL and width == SIZES[mine].d_model


def _row(mine: list[Result]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "rates0": [],
        "rates1": [],
        "stage0": {},
        "stage1": {},
        "grid": [],
        "pass": {},
        "leaders": {},
        "probe": {},
        "speedrun": [],
        "settled": _settled(mine),
    }
    rate = {"stage0": _chosen(mine, "stage0"), "stage1": _chosen(mine, "stage1") if _settled(mine) else None}
    for result in sorted(mine, key=lambda r: r.name):
        content, settings = result.content, result.content["settings"]
        stage, seed = content["stage"], str(settings["seed"])
        if stage in rate:
            if settings["lr"] == rate[stage]:
                row[stage][seed] = _text_cell(result)
            if seed != "0":
                continue
        if stage in RATES:
            row[RATES[stage]].append(
                {"lr": settings["lr"], "bits_per_byte": result.bits_per_byte, "diverged": result.diverged, "behind": said(content)}
                | _held(content)
            )
        elif stage in ("pass", "leaders"):
            row[stage][seed] = _text_cell(result)
        elif stage in ("time", "time0", "time1"):
            row.setdefault(content["name"].split(".")[0], {})[seed] = _text_cell(result)
        elif stage == "probe":
            lengths = [{key: r.get(key) for key in ("length", "accuracy", "error")} for r in content["measured"]["lengths"]]
            row["probe"].setdefault(settings["task"]["name"] + settings["task"].get("group", ""), {})[seed] = lengths
        elif stage == "speed" and settings.get("logits") == "made again":
            chosen = ("tokens_per_s", "mfu", "peak_memory_bytes", "decode", "decode_failed", "graphed", "busy", "launches", "kernels")
            row["speed"] = {key: content.get(key) for key in chosen} | {"device": (content.get("environment") or {}).get("device")}
        elif stage == "speedrun":
            words = f"rows={content['row']} speedrun_tokens={content['tokens']} speedrun_lr={settings['lr']:g}"
            command = f"python -m scripts.board run stages=speedrun {words}"
            run = {"seconds": content["seconds"], "tokens": content["tokens"], "lr": settings["lr"], "bits_per_byte": result.bits_per_byte}
            run["device"] = str((content.get("environment") or {}).get("device"))
            row["speedrun"].append(run | {"command": command})
    for rates in RATES.values():
        row[rates].sort(key=lambda cell: cell["lr"])
    return row


def _training(row: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s and MFU of a row's training alone on the device: the median of its cells of the full pass, which are newer than the stage speed; else that
    stage's; else the median of the cells that it has, of those with sums in order. own: whether of its cells. Empty where there are none."""

    def of(stages: tuple[str, ...]) -> list[dict[str, Any]]:
        return [c for stage in stages for c in row[stage].values() if c["tokens_per_s"] and c["code"]]

    cells = of(("pass",)) or ([] if "speed" in row else of(("stage0", "stage1")))
    if not cells:
        return {key: row["speed"][key] for key in ("tokens_per_s", "mfu", "device")} | {"own": False} if "speed" in row else {}
    speed, device = statistics.median(c["tokens_per_s"] for c in cells), cells[0]["device"]
    peak = peak_flops(device, "bf16")
    mfu = row["training_flops_per_token"] * speed / peak if peak else None
    return {"tokens_per_s": speed, "mfu": mfu, "device": device, "own": True}


def _drop_other_times(rows: dict[str, dict[str, Any]], name: str, board: Board) -> int:
    """Takes out the cells of equal time of a row that do not have the steps which the speeds measured by now ask for; how many."""
    dropped = 0
    for key in [key for key in rows[name] if key.startswith("time")]:
        other = ARCHITECTURES[name].of if key == "time1" else key.partition("_of_")[2]
        speeds = [rows.get(row, {}).get("speed", {}).get("tokens_per_s") for row in (name, other)]
        tokens = tokens_of(board, {"time0": "stage0", "time1": "stage1"}.get(key.split("_")[0], "pass"))
        steps = int(round(speeds[0] / speeds[1], 2) * tokens) // (board.rows * board.T) if all(speeds) else None
        stale = [seed for seed, cell in rows[name][key].items() if cell["of_steps"] != steps]
        for seed in stale:
            del rows[name][key][seed]
        dropped += len(stale)
    return dropped


def _tried(mine: list[Result], stage: str) -> dict[float, float]:
    """Bits per byte of seed 0 by rate; infinite where it diverged or was outrun."""
    cells = [r for r in mine if r.content["stage"] == stage and not r.content["settings"]["seed"]]
    return {r.content["settings"]["lr"]: math.inf if (loss := final_loss(r, r.content["settings"])) is None else loss for r in cells}


def _settled(mine: list[Result]) -> bool:
    """Whether a row's rate of stage 1 is known: the best of those tried there has a worse one on either side, or MOST_RATES were tried."""
    tried = _tried(mine, "stage1")
    return len(tried) >= MOST_RATES or bool(tried) and min(tried) < min(tried, key=tried.__getitem__) < max(tried)


def _chosen(mine: list[Result], stage: str) -> float | None:
    """The rate at which a row's seeds of stage 0 or 1 are run: the best with seed 0, half of it where a seed diverged there. None: without other seeds."""
    tried = _tried(mine, stage)
    if not tried:
        return None
    best = min(tried, key=tried.__getitem__)
    if any(r.diverged for r in mine if r.content["stage"] == stage and r.content["settings"]["lr"] == best):
        best /= 2
    seeds = [r.content["settings"]["lr"] for r in mine if r.content["stage"] == stage and r.content["settings"]["seed"]]
    return best if best in seeds else None


def _held(content: dict[str, Any]) -> dict[str, Any]:
    held = (content.get("measured") or {}).get("held_out") or {}
    return {
        "low": held.get("low"),
        "high": held.get("high"),
        "nats_per_token": held.get("nats_per_token"),
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
        "of_steps": content["settings"]["steps"],
        "stops": content.get("stops"),
        "tokens_per_s": content.get("tokens_per_s") if content.get("beside", 1) == 1 else None,
        "unordered": content.get("unordered") or "",
        "code": (content.get("environment") or {}).get("code", ""),
        "device": str((content.get("environment") or {}).get("device")),
        **_held(content),
        "curve": [[step, round(loss, 4)] for step, loss in content.get("curve", []) if loss is not None],
        "verdict": (position.get("collapse") or {}).get("verdict"),
        "buckets": position.get("buckets"),
        "repeated": (measured.get("repeated") or {}).get("gaps"),
        "memory": {key: value.get("tokens") for key, value in memory.items() if isinstance(value, dict)},
    }
