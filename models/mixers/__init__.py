"""Sequence mixers, one file each: a dataclass Config and a class Mixer. A mixer's config says its file: {type: attention, n_heads: 8}."""

from __future__ import annotations

import dataclasses
import importlib
import keyword
import math
import pkgutil
import typing
from types import ModuleType
from typing import Any

from data.errors import UserError
from data.fields import close_to, read


def available() -> list[str]:
    """Types of the mixers found on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(type_: str) -> ModuleType:
    """The module models/mixers/<type>.py. Raises UserError for an unknown one."""
    if type_ not in available():
        raise UserError(f"there is no mixer type {type_!r}; models/mixers/ holds {', '.join(available())}")
    return _module(type_)


def _module(type_: str) -> ModuleType:
    """The imported file of a mixer. Raises UserError where it is none."""
    from models.contract import SequenceMixer

    file = f"models/mixers/{type_}.py"
    if not type_.isidentifier() or keyword.iskeyword(type_):
        raise UserError(f"the mixer {type_!r} cannot be used under this name; rename {file} to letters, digits and underscores")
    try:
        module = importlib.import_module(f"{__name__}.{type_}")
    except SyntaxError as reason:
        raise UserError(f"{file} is not Python: {reason.msg} in line {reason.lineno}") from None
    except Exception as reason:  # whatever a file of the user's does
        first = (str(reason).splitlines() or [""])[0].rstrip(".")
        raise UserError(f"{file} cannot be imported: {type(reason).__name__}: {first}") from None
    config, mixer = getattr(module, "Config", None), getattr(module, "Mixer", None)
    if not dataclasses.is_dataclass(config) or not callable(getattr(config, "problems", None)):
        raise UserError(f"{file} must define a dataclass Config with a method problems(d_model), which returns a list of sentences")
    if not (isinstance(mixer, type) and issubclass(mixer, SequenceMixer)):
        raise UserError(f"{file} must define a class Mixer(SequenceMixer), of models.contract")
    return module


def parse(name: str, mapping: dict[str, Any], d_model: int) -> tuple[Any, list[str]]:
    """(the mixer's Config or None, problems in sentences) of the mapping `mixers.<name>`."""
    try:
        schema = load(str(mapping.get("type"))).Config
    except ValueError as error:
        return None, [f"model.mixers.{name}: {error}."]
    hints, where = typing.get_type_hints(schema), f"model.mixers.{name}."
    problems: list[str] = []
    settings = {key: value for key, value in mapping.items() if key != "type"}
    values = read(settings, hints, where, problems, exact=True, names={})
    for key, value in list(values.items()):
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{where}{key} must be a finite number, not {values.pop(key)}.")
    # Where a key that was meant is missing, combinations cannot be judged.
    meant = {key if key in hints else close_to(str(key), hints) for key in settings} - {""}
    unread = not meant <= values.keys()
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
