"""What was measured of a checkpoint, as a section of its model card (models/hub/card.py): held-out text and the suites of evals.run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals.report.figures import curves_figure, pyplot
from evals.report.page import Page
from evals.report.records import Records, read
from evals.report.sections import draw_sections, texts
from models.hub.card import Evaluation, is_number, read_or_empty

SHOWN = ("bits_per_byte", "perplexity", "nats_per_token", "tokens")  # of an evaluation of held-out text


def evaluation(source: Path, evals: Path | None = None) -> Evaluation | None:
    """Held-out text from eval*.json beside the checkpoint `source` or in its run folder, and the suites in `evals` (OUT or OUT/MODEL of
    evals.run), with their tables and plots; None where nothing was measured."""
    rows, curve, status = held_out(source)
    records: Records = {}
    if evals is not None:
        every = read(evals) or read(evals.parent)
        records = {model: items for model, items in every.items() if model == evals.name} or every
    if not rows and not records:
        return None
    page, plt = Page(), pyplot()
    page.head("Evaluation")
    page.table(["file", "number", ""], rows)
    if curve:
        length = (read_or_empty(source / "run.json").get("train") or {}).get("seq_len")
        page.figure("held_out", curves_figure(plt, [(f"text ({status})", curve, length)], "loss by position"), "loss by position")
    texts(page, records)
    draw_sections(page, plt, records, "Measured by `python -m evals.run`.")
    plots = {value[0]: value[1] for kind, value in page.parts if kind == "figure"}
    return Evaluation(page.markdown().removeprefix("# Evaluation\n"), plots)


def held_out(source: Path) -> tuple[list[list[Any]], list[dict[str, Any]], str]:
    """(table rows of the eval*.json of a checkpoint and its run, the first loss by position among them, whether that text was trained on)."""
    rows: list[list[Any]] = []
    curve: list[dict[str, Any]] = []
    status = "held out"  # of the evaluations in training
    for path in [p for folder in (source, source.parent.parent) for p in sorted(folder.glob("eval*.json"))]:
        value = read_or_empty(path)
        measured = value["perplexity"] if isinstance(value.get("perplexity"), dict) else value
        rows += [[path.name, key, measured[key]] for key in SHOWN if is_number(measured.get(key))]
        baselines = value.get("baselines") or value.get("baselines_bits_per_byte") or {}
        counts = {name: baselines.get(name) for name in ("unigram", "bigram")}
        rows += [[path.name, f"{name} counts, bits_per_byte", bits] for name, bits in counts.items() if is_number(bits)]
        if not curve:
            curve, status = measured.get("by_position") or [], (value.get("seen") or {}).get("status", status)
    return rows, curve, status
