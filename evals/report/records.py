"""The records of measurements under a folder: the JSON that evals/suites/runner.py writes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Records = dict[str, list[dict[str, Any]]]  # by model


def read(out: Path) -> Records:
    """All records under OUT by model, models in the order of their names; torn files, and JSON that is no record, are passed over."""
    records: Records = {}
    for path in sorted(out.glob("*/items/*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if _is_record(record):
            records.setdefault(path.parent.parent.name, []).append(record)
    return records


def _is_record(value: Any) -> bool:
    def holds(kind: type, *keys: str) -> bool:
        return all(isinstance(value.get(key), kind) for key in keys)

    if not isinstance(value, dict) or not holds(str, "item", "kind", "status") or not holds(dict, "model", "environment"):
        return False
    return holds(dict, "result") if value["status"] == "done" else holds(str, "reason")


def done(records: Records, kind: str) -> Records:
    """The records of measured items of one kind; models without any are left out."""
    chosen = {model: [r for r in items if r["kind"] == kind and r["status"] == "done"] for model, items in records.items()}
    return {model: items for model, items in chosen.items() if items}
