"""Agreement of the ranks at the start: the same settings, code, libraries and data everywhere, or one sentence that names who differs.

Clocks, host names, devices and environment variables may differ: nothing in training reads another rank's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from training.config.schema import Config
from training.errors import UserError
from training.world import World

ROOT = Path(__file__).resolve().parents[2]
CODE = ("train.py", "models", "kernels", "training", "data", "evals")
ADVICE = {
    "code": "give every machine the same checkout",
    "library": "give every machine the same environment",
    "data": "give every machine the same token shards",
    "setting": "start every machine with the same command",
}


def code_hash(root: Path = ROOT) -> str:
    """A short hash over every Python file that a run may use, committed or not."""
    digest = hashlib.sha256()
    for name in CODE:
        for path in sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]:
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _settings(value: Any, key: str) -> dict[str, str]:
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in _settings(inner, f"{key}.{name}" if key else str(name)).items()}
    return {f"setting {key}": json.dumps(value, default=str)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def facts(config: Config, fingerprints: list[str]) -> dict[str, str]:
    """The values that have to be equal on all ranks, by the name that a message shows."""
    libraries = {f"library {name}": _version(name) for name in ("torch", "deepspeed", "numpy")}
    python = {"library python": ".".join(platform.python_version_tuple()[:2])}
    data = {f"data fingerprint {i}": text for i, text in enumerate(fingerprints)}
    return {"code hash": code_hash(), **python, **libraries, **data, **_settings(dataclasses.asdict(config), "")}


def differences(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence for each rank whose facts are not rank 0's, at most four; rows: facts and 'host' of every rank."""
    first, sentences = rows[0]["facts"], []
    for rank, row in enumerate(rows):
        theirs = row["facts"]
        keys = [key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key)]
        if keys:
            key = min(keys)
            kind, _, name = key.partition(" ")
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            sentences.append(
                f"Rank {rank} ({row['host']}) differs from rank 0 ({rows[0]['host']}) in {kind} {name}{more}: "
                f"{theirs.get(key, 'none')} there, {first.get(key, 'none')} here; {ADVICE[kind]}."
            )
    return sentences[:4]


def agree(world: World, config: Config, fingerprints: list[str], problem: str = "") -> None:
    """Raises the same UserError on every rank when one of them has a `problem` of its own (its data, say) or differs from rank 0."""
    mine = {"host": socket.gethostname(), "problem": problem, "facts": facts(config, fingerprints) if not problem else {}}
    rows = [json.loads(text) for text in world.texts(json.dumps(mine))]
    messages: dict[str, str] = {}
    for rank, row in enumerate(rows):
        for line in row["problem"].splitlines():
            messages.setdefault(line, line if world.size == 1 or rank == 0 else f"Rank {rank} ({row['host']}): {line}")
    problems = list(messages.values()) or differences(rows)
    if problems:
        raise UserError(problems)
