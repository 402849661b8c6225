"""A program that looks at one model on rows of prose: reads both, calls what measures, writes the JSON and the page, and prints the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import save_report
from evals.adapters.base import Adapter, ItemError
from evals.adapters.load import device_of, load_adapter
from evals.suites.subject import Settings, Subject
from training.errors import UserError
from training.watch.metrics import environment


def report_on_prose(
    name: str,
    values: dict[str, Any],
    measure: Callable[[Adapter, Tensor], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
    labels: int = 0,
) -> dict[str, Any]:
    """The report, also written as NAME.json and .md beside the model, or where values["out"] says.

    values: of checkpoint, device, data, text, seed, rows, length and out. measure: (model, token ids (rows, length + labels)) -> what it adds to
    the report. Raises UserError.
    """
    device = device_of(values["device"])
    adapter = load_adapter(values["checkpoint"], device)
    subject = Subject(adapter, Settings(data=values["data"], text=values["text"], seed=values["seed"]), path=values["checkpoint"])
    out = Path(values["out"] or Path(adapter.folder) / f"{name}.json")
    try:
        ids = torch.from_numpy(subject.rows_of("prose", values["rows"], values["length"] + labels))
        measured = measure(adapter, ids)
    except ItemError as error:
        raise UserError(str(error)) from error
    about = {"rows": ids.shape[0], "length": ids.shape[1] - labels, "text": subject.text.source, "seen": subject.about_text()["seen"]}
    report = {"arguments": values, "model": adapter.describe(), **about, **measured, "environment": environment(device)}
    save_report(out, report, page(report))
    print(page(report) + f"\nwritten to {out} and {out.with_suffix('.md')}")
    return report


def problems_of_text(values: dict[str, Any]) -> list[str]:
    """What is wrong with the arguments that say which model and text, a sentence each."""
    problems = [] if values["checkpoint"] else ["Say what to look at: checkpoint=DIR."]
    if values["text"] is not None and values["data"] is not None:
        problems.append("text and data both say what to read; give one of them.")
    return problems
