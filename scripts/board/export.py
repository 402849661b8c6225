"""Trained cells as folders that `transformers` loads, with cards that carry the board's numbers.

    python -m scripts.board run stages=leaders weights=true data=DIR out=OUT            # cells of the leaders keep their weights anyway
    python -m scripts.board export out=OUT [only=CELL,CELL]                             # writes OUT/exported/CELL
    python -m evals.run checkpoint=OUT/models/CELL suite=quick only=passkey out=OUT/evals      # before: then its figures are in the card too

The folder is checked as scripts/export.py checks it: loaded by transformers alone in a fresh process and compared.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from data.fields import nearest
from evals.report.card import evaluation
from models.hub.card import Evaluation
from models.hub.export import export
from scripts.board.answers import bits
from scripts.board.draw import collect
from scripts.board.results import Result, attempts, every, interval
from scripts.board.tables import STAGE_NAMES
from training.errors import UserError


def export_cells(values: dict[str, Any]) -> list[Path]:
    """The folders of the cells named by only=, or of all that have weights under OUT/models. Raises UserError."""
    out, page = Path(values["out"]), Path(values["page"])
    there = sorted(path.name for path in (out / "models").glob("*") if (path / "model.safetensors").exists())
    results = every(out, page)
    for name in values["only"]:
        if there and name not in there:
            raise UserError(
                f"only: {nearest(name, there, known_as='there are')} ({out / 'models'} has no {name!r}; run the cell with weights=true)"
            )
    if not there:
        raise UserError(f"{out / 'models'} has no trained model; run cells with weights=true, or stages=leaders.")
    rows = collect(values["size"], results, attempts(page))["rows"]
    known, made = {result.name: result for result in results}, []
    for name in values["only"] or there:
        if name not in known:
            raise UserError(f"{name} has weights but no result in {out} or {page}.")
        card = functools.partial(section, result=known[name], rows=rows, size=values["size"])
        made.append(export(out / "models" / name, out / "exported" / name, evaluate=card))
        print(f"{made[-1]}: loaded by transformers in a fresh process, and compared")
    return made


def section(source: Path, result: Result, rows: dict[str, Any], size: str) -> Evaluation:
    """The card's section of measurements: this cell's, its row's over seeds, and how to train it again."""
    content, settings = result.content, result.content["settings"]
    measured, row = content.get("measured") or {}, rows.get(content["row"], {})
    held, lines = measured["held_out"], ["| measure | number |", "|---|---|"]
    spread = f" ({held['low']:.4f} to {held['high']:.4f}, 95 % over documents)" if held.get("low") is not None else ""
    lines.append(f"| held-out bits per byte, windows of {settings['T']} tokens | {held['bits_per_byte']:.4f}{spread} |")
    for stage, name in STAGE_NAMES.items():
        over = interval(bits(rows, content["row"], stage).values())
        if over is not None:
            half = f" ± {over.half:.4f} (95 %)" if over.n > 1 else ""
            lines.append(f"| this architecture after {name}, over {over.n} seeds | {over.mean:.4f}{half} |")
    if verdict := ((measured.get("position") or {}).get("collapse") or {}).get("verdict"):
        lines.append(f"| past the training length, 64 times | {verdict} |")
    for gap in (measured.get("repeated") or {}).get("gaps", []):
        lines.append(f"| share of the loss saved on a passage read before, {gap['gap']} tokens between | {100 * gap['copied']:.0f} % |")
    for what, memory in (measured.get("memory") or {}).items():
        if isinstance(memory, dict):
            lines.append(f"| effective memory, {what} the training length ({memory['length']} tokens) | {memory['tokens']} tokens |")
    for decode in (row.get("speed") or {}).get("decode") or []:
        where = f"{decode['context']:,} tokens, {row['speed']['device']}"
        lines.append(
            f"| decoding after {where} | {decode['tokens_per_s']:,.0f} tokens/s, {decode['state_bytes_per_sequence']:,} state bytes |"
        )
    command = f"python -m scripts.board again only={result.name} size={size} data=DIR weights=true"
    lines += [
        "",
        f"A cell of the board (docs/board, protocol {settings['protocol']}), `{result.name}`, trained by",
        "",
        f"    {command}",
        "",
    ]
    lines.append(f"SHA-256 of its weights: `{content.get('weights_sha256')}`.")
    evals = source.parent.parent / "evals" / source.name
    other = evaluation(source, evals if evals.is_dir() else None)
    rest = "" if other is None else "\n\n" + other.markdown.strip().removeprefix("## Evaluation").strip()
    text = "## Evaluation\n\n" + "\n".join(lines) + rest
    return Evaluation(text, other.plots if other is not None else {})
