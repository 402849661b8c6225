"""What a start changes: the settings that differ from the checkpoint's, the learning rate that jumps, and the history of a run folder's starts.

config.yaml holds the settings of the last start; history/config-0001.yaml, ... those of every start that changed them, and history/starts.jsonl a row
for each start: when, from which step and checkpoint, with which of these files, and what was different.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from data.files import write_bytes
from models.config import ModelConfig
from models.hub.importing import ARCHITECTURE
from training.config.schema import Config, parse
from training.cursor import Cursor

# Keys that describe a start and not the training: its folders and names, how it resumes, and values that only fill in other keys.
NOT_COMPARED = (
    "name",
    "run_dir",
    "dry_run",
    "size",
    "train.resume",
    "train.start_from",
    "train.start_with",
    "train.check_memory",
    "profile",
)
DERIVED = (
    "head_dim",
    "n_kv_heads",
    "n_k_heads",
)  # sizes that follow from others where they are 0, and are written out in a folder's config
NOTABLE = 0.01  # relative change of the learning rate that is a jump


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """The leaves of a tree of mappings by dotted key."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{key}.{name}" if key else str(name)).items()}
    return {key: value}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'key: old -> new' for every setting that both have and that differs; of keys that only one of them has, those of data.path."""
    old, new = flat(before), flat(now)
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        if any(key == name or key.startswith(f"{name}.") or name == "profile" and key.startswith("profile_") for name in NOT_COMPARED):
            continue
        both = key in old and key in new
        if both and old[key] != new[key]:
            lines.append(f"{key}: {_shown(old[key])} -> {_shown(new[key])}")
        elif not both and key.startswith("data.path"):
            lines.append(f"{key}: {_shown(old[key]) if key in old else 'not there'} -> {_shown(new[key]) if key in new else 'not there'}")
    return lines


def compared(before: dict[str, Any], now: dict[str, Any], folder: Path, built: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the checkpoint in `folder` and those of now, as `differences` takes them: where one of them has its model from a folder
    (model=hf:), whose architecture its own keys do not say, both with the one that was built. built: the model's config now."""
    if not any(side.get("model", {}).get("init_from") for side in (before, now)):
        return before, now
    there, here = (
        {**c.to_dict(), "d_ff": c.mlp_width} for c in (ModelConfig.from_dict(json.loads((folder / "config.json").read_text())), built)
    )

    def with_built(settings: dict[str, Any], config: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        mixers = {
            name: {key: value for key, value in mixer.items() if key not in DERIVED or value and other["mixers"].get(name, {}).get(key)}
            for name, mixer in config["mixers"].items()
        }
        architecture = {key: config[key] for key in ARCHITECTURE if key in config}
        return {**settings, "model": {**settings.get("model", {}), **architecture, "mixers": mixers}}

    return with_built(before, there, here), with_built(now, here, there)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def lr_jump(before: dict[str, Any], config: Config, cursor: Cursor) -> str:
    """A sentence where the next step has another learning rate than the checkpoint's settings would have given it, else ''."""
    try:
        old: Config = parse(before, Config, "", [])
        old.at = cursor.position()
        then, now = old.lr_at(cursor.step, cursor.tokens), config.lr_at(cursor.step, cursor.tokens)
    except (AssertionError, AttributeError, TypeError, ValueError, ZeroDivisionError):  # settings of an older program
        return ""
    if abs(now - then) <= NOTABLE * max(then, now):
        return ""
    return f"the learning rate jumps: step {cursor.step + 1} has {now:.3e}, where the checkpoint's settings give {then:.3e}."


def finished(config: Config, cursor: Cursor) -> str:
    """The sentence for a run that has no step left to take; '' where there is one."""
    if cursor.step < config.total_steps:
        return ""
    key = "train.steps" if config.train.steps is not None else "train.tokens"
    asked = config.train.steps if config.train.steps is not None else config.train.tokens
    return (
        f"this run is finished: it is at step {cursor.step:,} ({cursor.tokens:,} tokens) and {key}={asked:,.15g} asks for no more; "
        f"raise {key} to go on, or give another name (or run_dir) to begin a new run."
    )


def keep_history(run_dir: Path, resolved_yaml: str, row: dict[str, Any]) -> None:
    """Writes config.yaml and, where it says something new, its numbered copy; adds `row` to the list of starts. Raises OSError."""
    folder, present = run_dir / "history", run_dir / "config.yaml"
    copies = sorted(folder.glob("config-*.yaml"))
    if not copies and present.exists():  # the run began under a release that wrote no history
        copies = [folder / "config-0000.yaml"]
        write_bytes(copies[0], present.read_bytes())
    if not copies or copies[-1].read_text() != resolved_yaml:
        copies.append(folder / f"config-{1 + int(copies[-1].stem.rpartition('-')[2]) if copies else 1:04d}.yaml")
        write_bytes(copies[-1], resolved_yaml.encode())
    write_bytes(present, resolved_yaml.encode())
    starts = folder / "starts.jsonl"
    earlier = starts.read_text() if starts.exists() else ""
    new = json.dumps({"time": time.time(), "config": copies[-1].name, **row}, default=str) + "\n"
    write_bytes(starts, (earlier + new).encode())
