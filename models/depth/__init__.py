"""Ways through the depth of a model that are not once through each block, one file each: a dataclass Config and a class Way (models/walk.py).

A model's config says which: depth {type: recurrent, loops: 8}; without it every block is visited once.
"""

from __future__ import annotations

import importlib
import pkgutil
import typing
from typing import TYPE_CHECKING, Any

from data.fields import nearest, read

if TYPE_CHECKING:
    from models.walk import Depth


def available() -> list[str]:
    """Types of the ways found on disk."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def parse(mapping: dict[str, Any], n_layers: int) -> tuple[Any, list[str]]:
    """(the way's Config or None, problems in sentences) of the mapping `model.depth`."""
    kind = str(mapping.get("type"))
    if kind not in available():
        return None, [f"model.depth.type is {kind!r}; {nearest(kind, available(), known_as='choose one of')}"]
    schema = importlib.import_module(f"{__name__}.{kind}").Config
    problems: list[str] = []
    settings = {key: value for key, value in mapping.items() if key != "type"}
    values = read(settings, typing.get_type_hints(schema), "model.depth.", problems, exact=True)
    if problems:
        return None, problems
    config = schema(**values)
    problems = [f"model.depth: {problem}" for problem in config.problems(n_layers)]
    return None if problems else config, problems


def build(mapping: dict[str, Any], d_model: int, n_layers: int) -> Depth | None:
    """The Way of a mapping that `parse` accepts; None for an empty one."""
    if not mapping:
        return None
    config, problems = parse(mapping, n_layers)
    assert config is not None and not problems, problems
    way: Depth = importlib.import_module(f"{__name__}.{mapping['type']}").Way(config, d_model, n_layers)
    return way
