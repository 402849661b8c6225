"""Command lines of `key=value` words, for every program but train.py, whose command line is Hydra's."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

from data.fields import from_text, read_words
from kernels.interrupts import INTERRUPTED
from training.errors import UserError, sentence_of

Values = dict[str, Any]


def parse_arguments(words: list[str], defaults: Values, check: Callable[[Values], list[str]] | None = None) -> Values:
    """`defaults` with what the words change; a default says what its key takes.

    False or True: true or false; a whole number: one above zero (or zero, where that is the default); a fraction: any finite number; a list: whole
    numbers with commas between; None or text: text; the class int: a whole number above zero, None if not given. `--key=value` and
    `--key value` are read as well. Raises UserError with all problems, those that `check` finds in the values among them.
    """
    values: Values = {key: None if default is int else default for key, default in defaults.items()}
    problems: list[str] = []
    values |= read_words(_joined(words), lambda key, text: _convert(text, defaults[key]), list(defaults), problems)
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
    kind: Any = int if default is int else str if default is None else list[int] if isinstance(default, list) else type(default)
    value = from_text(text, kind)
    if kind is int and value < (default != 0):
        raise ValueError("a whole number above zero" if default != 0 else "a whole number of zero or more")
    if kind == list[int] and min(value, default=1) < 1:
        raise ValueError("whole numbers above zero with commas between them")
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def program(doc: str | None, run: Callable[[list[str]], Any], words: list[str] | None = None) -> int:
    """Exit status of a program whose body is `run`, without tracebacks for what is no fault of the program: its docstring for -h, a line for
    each problem of a UserError and one for what the operating system refuses (2), a word for Ctrl-C (130)."""
    words = sys.argv[1:] if words is None else words
    try:
        if any(word in ("-h", "--help", "help") for word in words):
            print(doc, flush=True)
            return 0
        unreadable(words)
        return int(run(words) or 0)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        print(f"error: {sentence_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def unreadable(words: list[str]) -> None:
    """Raises UserError for words of the command line that hold bytes which are no text in this terminal's encoding."""
    broken = [word for word in words if any("\udc80" <= c <= "\udcff" for c in word)]  # as Python keeps bytes it cannot decode
    if broken:
        raise UserError(
            [
                f"The argument {os.fsencode(word).decode(errors='backslashreplace')} holds bytes that are no "
                f"{sys.getfilesystemencoding().upper()} text; write it in that encoding."
                for word in broken
            ]
        )
