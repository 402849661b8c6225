"""Command lines of `key=value` words, for every program but train.py, whose command line is Hydra's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from data.errors import UserError
from data.fields import from_text, read_words
from data.program import program, ready

__all__ = ["parse_arguments", "program", "ready"]

Values = dict[str, Any]


def parse_arguments(words: list[str], defaults: Values, check: Callable[[Values], list[str]] | None = None) -> Values:
    """`defaults` with what the words change; a default says what its key takes.

    False or True: true or false; a whole number: one above zero (or zero, where that is the default); a fraction: any finite number; a list: whole
    numbers with commas between; None or text: text; the class int: a whole number above zero, None if not given. `--key=value` and
    `--key value` are read as well. Of a key that comes again, as behind the settings of a script, the last holds, and a note says so. Raises UserError with all problems, those that `check` finds in the values among them.
    """
    values: Values = {key: None if default is int else default for key, default in defaults.items()}
    problems: list[str] = []
    values |= read_words(_last_of_each(_joined(words)), lambda key, text: _convert(text, defaults[key]), list(defaults), problems)
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


def _last_of_each(words: list[str]) -> list[str]:
    last = {word.partition("=")[0]: i for i, word in enumerate(words)}
    for i, word in enumerate(words):
        if (key := word.partition("=")[0]) and last[key] != i:
            print(f"note: {word} does not hold, as {words[last[key]]} comes behind it.", file=sys.stderr)
    return [word for i, word in enumerate(words) if last[word.partition("=")[0]] == i]


def _convert(text: str, default: Any) -> Any:
    """`text` as the kind of `default`. Raises ValueError that says what it must be."""
    kind: Any = int if default is int else str if default is None else list[int] if isinstance(default, list) else type(default)
    value = from_text(text, kind)
    if kind is int and value < (default != 0):
        raise ValueError("a whole number above zero" if default != 0 else "a whole number of zero or more")
    if kind == list[int] and min(value, default=1) < 1:
        raise ValueError("whole numbers above zero with commas between them")
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value
