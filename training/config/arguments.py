"""Command lines of `key=value` words, for every program but train.py, whose command line is Hydra's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from data.errors import UserError
from data.program import program, unreadable
from training.config.schema import nearest

__all__ = ["parse_arguments", "program", "unreadable"]

Values = dict[str, Any]


def parse_arguments(words: list[str], defaults: Values, check: Callable[[Values], list[str]] | None = None) -> Values:
    """`defaults` with what the words change; a default says what its key takes.

    False or True: true or false; a whole number: one above zero (or zero, where that is the default); a fraction: any finite number; a list: whole
    numbers with commas between; None or text: text; the class int: a whole number above zero, None if not given. `--key=value` and
    `--key value` are read as well. Raises UserError with all problems, those that `check` finds in the values among them.
    """
    values: Values = {key: None if default is int else default for key, default in defaults.items()}
    problems = []
    for word in _joined(words):
        key, equals, text = word.partition("=")
        if not equals or key not in defaults:
            problems.append(f"Unknown argument {word!r}; {nearest(key, list(defaults))}")
            continue
        try:
            values[key] = _convert(text, defaults[key])
        except ValueError as error:
            problems.append(f"{key} must be {error}, not {text!r}.")
    problems += check(values) if check is not None else []
    if problems:
        raise UserError(problems)
    return values


def _joined(words: list[str]) -> list[str]:
    joined: list[str] = []
    waiting = False
    for word in words:
        if waiting:
            joined[-1] += "=" + word
        else:
            joined.append(word.removeprefix("--"))
        waiting = not waiting and word.startswith("--") and "=" not in word
    return joined


def _convert(text: str, default: Any) -> Any:
    """`text` as the kind of `default`. Raises ValueError that says what it must be."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if default is int or isinstance(default, int):
        if not text.isdigit() or int(text) == 0 and default != 0:
            raise ValueError("a whole number" if default == 0 else "a whole number above zero")
        return int(text)
    if isinstance(default, float):
        try:
            value = float(text)
        except ValueError:
            raise ValueError("a number") from None
        if not math.isfinite(value):
            raise ValueError("a finite number")
        return value
    if isinstance(default, list):
        parts = text.strip("[]").split(",") if text else []
        if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            raise ValueError("whole numbers above zero with commas between them")
        return [int(part) for part in parts]
    return text
