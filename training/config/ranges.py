"""The range of every number in a run's settings, declared where the setting is: `steps: Annotated[int, Range(1)]`.

Numbers are compared with their ranges before anything else is done with them, so that NaN, infinities and wrong signs end in a sentence.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MANY = 10**12  # steps, samples: more than any run takes


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included, or without `low` itself; never NaN or infinite. hint: what the person who tried it may have meant."""

    low: float = 0
    high: float = math.inf
    above: bool = False
    hint: str = ""

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and value <= self.high and (value > self.low if self.above else value >= self.low)

    def words(self, value: float) -> str:
        """What completes 'must be ...'. A high limit that only keeps numbers finite is left out unless `value` exceeds it."""
        whole = self.low == 1 and not self.above
        if self.high <= 3 or value > self.high and math.isfinite(value):
            return f"{'above' if self.above else 'from'} {self.low:g} {'and at most' if self.above else 'to'} {self.high:,.15g}"
        if self.low == 0 or whole:
            return "above zero" if self.above or whole else "zero or more"
        return f"{'above ' if self.above else ''}{self.low:g}{'' if self.above else ' or more'}"

    def problem(self, key: str, value: float) -> str:
        """'' where `value` lies inside, else a sentence."""
        if self.holds(value):
            return ""
        finite = "" if math.isfinite(value) else "a finite number "
        return f"{key} must be {finite}{self.words(value)}, not {value:,}{f'; {self.hint}' if self.hint else ''}."


POSITIVE = Range(0, above=True)
COUNT = Range(1, MANY)
AMOUNT = Range(0, MANY)
SHARE = Range(0, 1)
MINUTES = Range(0, 10**6, above=True)


def _unions(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)


def _declared(hint: Any) -> tuple[bool, Range | None]:
    """(whether a field with this hint holds numbers, the range that it declares)."""
    limits = next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)), None)
    options = _unions(hint.__origin__ if hasattr(hint, "__metadata__") else hint)
    for option in options:
        if typing.get_origin(option) is list:
            return _declared(typing.get_args(option)[0])
    return any(option in (int, float) for option in options), limits


def declared(schema: type, prefix: str = "") -> Iterator[tuple[str, Range | None]]:
    """(dotted key, range or None) of every number in the dataclass `schema` and those in it."""
    for key, hint in typing.get_type_hints(schema, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from declared(typing.cast(type, hint), f"{prefix}{key}.")
        else:
            numeric, limits = _declared(hint)
            if numeric:
                yield f"{prefix}{key}", limits


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def problems(settings: Any) -> list[str]:
    """A sentence for every number of the dataclass tree `settings` that lies outside its declared range. Values that are no numbers are not
    judged here."""
    sentences = []
    for key, limits in declared(type(settings)):
        value = settings
        for part in key.split("."):
            value = getattr(value, part)
        several = list(value) if isinstance(value, (list, tuple)) else None
        for i, item in enumerate(several if several is not None else [value]):
            if _number(item) and limits is not None:
                sentences.append(limits.problem(key if several is None else f"{key}[{i}]", item))
    return [text for text in sentences if text]


def loose(mapping: Any, path: str) -> list[str]:
    """Numbers of a free mapping (no schema says their ranges) that are NaN or infinite."""
    if isinstance(mapping, dict):
        return [text for key, value in mapping.items() for text in loose(value, f"{path}.{key}")]
    if isinstance(mapping, (list, tuple)):
        return [text for i, value in enumerate(mapping) for text in loose(value, f"{path}[{i}]")]
    return [f"{path} must be a finite number, not {mapping}."] if _number(mapping) and not math.isfinite(mapping) else []
