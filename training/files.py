"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON; NaN and infinities become null, as JSON has none, and what JSON does not know its text."""
    write_bytes(path, (json.dumps(_finite(value), indent=1, default=str) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
