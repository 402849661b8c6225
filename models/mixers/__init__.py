"""Sequence mixers, one file each: a dataclass Config and a class Mixer. A mixer's config says its file: {type: attention, n_heads: 8}."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import pkgutil
import typing
from types import ModuleType
from typing import Any

from data.errors import UserError


def available() -> list[str]:
    """Types of the mixers found on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(type_: str) -> ModuleType:
    """The module models/mixers/<type>.py. Raises ValueError for an unknown one."""
    if type_ not in available():
        raise UserError(f"there is no mixer type {type_!r}; models/mixers/ holds {', '.join(available())}")
    return importlib.import_module(f"{__name__}.{type_}")


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    options = typing.get_args(wanted)
    return any(_fits(value, o) for o in options) if options else isinstance(value, wanted)


def parse(name: str, mapping: dict[str, Any], d_model: int) -> tuple[Any, list[str]]:
    """(the mixer's Config or None, problems in sentences) of the mapping `mixers.<name>`."""
    try:
        schema = load(str(mapping.get("type"))).Config
    except ValueError as error:
        return None, [f"model.mixers.{name}: {error}."]
    hints, values, problems = typing.get_type_hints(schema), {}, []
    unread = False  # a key that was meant is missing, so that combinations cannot be judged
    for key, value in mapping.items():
        if key == "type":
            continue
        if key not in hints:
            close = difflib.get_close_matches(str(key), list(hints), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(hints)}."
            problems.append(f"Unknown key 'model.mixers.{name}.{key}'; {hint}")
            unread |= bool(close) and close[0] not in mapping
        elif not _fits(value, hints[key]):
            kind = getattr(hints[key], "__name__", hints[key])
            problems.append(f"model.mixers.{name}.{key} must be of type {kind}, not {value!r}.")
            unread = True
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"model.mixers.{name}.{key} must be a finite number, not {value}.")
            unread = True
        else:
            values[key] = value
    if unread:
        return None, problems
    config = schema(**values)
    problems += [f"model.mixers.{name}: {problem}" for problem in config.problems(d_model)]
    return None if problems else config, problems


def build(mapping: dict[str, Any], d_model: int, layer: int) -> Any:
    """The Mixer of a mapping that `parse` accepts."""
    config, problems = parse("?", mapping, d_model)
    assert config is not None and not problems, problems
    return load(mapping["type"]).Mixer(config, d_model, layer)


def to_dict(config: Any, type_: str) -> dict[str, Any]:
    return {"type": type_, **dataclasses.asdict(config)}
