"""Settings from outside, checked against a dataclass: mappings from YAML and JSON, and `key=value` words of a command line.

One place decides which keys there are, which values pass for which type, and what a mistake is told. pydantic would read the same dataclasses, but
its kinds of errors would all have to be put into sentences again, its own leniency switched off type by type, and every program would load it.
Mistakes are collected, a sentence each, so that they can be reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a group of keys"}

Hints = dict[str, Any]

SPOKEN = ("prompt", "stop")  # keys whose text is what is meant, whatever it begins with


def at_home(text: str) -> str:
    """`text` with the home folder where it, or what follows a comma in it, begins with ~/, which many shells leave alone inside a word: a folder of
    the name ~ would be made."""
    return ",".join(os.path.expanduser(part) if part.startswith("~/") else part for part in text.split(","))


def close_to(key: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of `known` that `key` looks like, or ''."""
    return next(iter(difflib.get_close_matches(key, list(known), n=1, cutoff=cutoff)), "")


def nearest(key: str, known: Iterable[str], cutoff: float = 0.6, known_as: str = "known keys are") -> str:
    """'did you mean X?' for a near miss, else the list of what there is."""
    close = close_to(key, known, cutoff)
    return f"did you mean {close!r}?" if close else f"{known_as} {', '.join(sorted(known))}."


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a type hint allows: those of a union, or itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)


def _convert(value: Any, hint: Any) -> Any:
    """`value` as one of the types of `hint`: a whole float (1e6) passes for an int, an int or text like 3e-4, which YAML 1.1 does not take for a
    number, for a float, and a number for text. Raises ValueError."""
    if hint is Any:
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for option in options_of(hint):
        kind = typing.get_origin(option) or option
        if kind is types.NoneType and value is None or kind is bool and isinstance(value, bool) or kind is dict and isinstance(value, dict):
            return value
        if kind is int and number and math.isfinite(value) and value == int(value):
            return int(value)
        if kind is float and (number or isinstance(value, str)):
            try:
                return float(value)
            except ValueError:
                continue
        if kind is str and (number or isinstance(value, str)):
            return str(value)
        if kind is list and isinstance(value, (list, tuple)):
            return [_convert(item, (typing.get_args(option) or (Any,))[0]) for item in value]
    raise ValueError


def _exactly(value: Any, hint: Any) -> Any:
    """`value`, which has to be of a type of `hint` already; an int passes for a float. Raises ValueError."""
    for option in options_of(hint):
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
        if isinstance(value, typing.get_origin(option) or option) and (option is bool or not isinstance(value, bool)):
            return value
    raise ValueError


def _wrong_type(path: str, value: Any, hint: Any, names: dict[Any, str], hint_for_text: Callable[[str, Any], str]) -> str:
    """The sentence for a value that does not pass for its type, of a list for its first such item."""
    options = options_of(hint)
    for option in options:
        if typing.get_origin(option) is list and isinstance(value, (list, tuple)):
            item_hint = typing.get_args(option)[0]
            for i, item in enumerate(value):
                try:
                    _convert(item, item_hint)
                except ValueError:
                    return _wrong_type(f"{path}[{i}]", item, item_hint, names, hint_for_text)
    kinds = [typing.get_origin(option) or option for option in options if option is not types.NoneType]
    expected = " or ".join(names.get(kind, f"of type {getattr(kind, '__name__', kind)}") for kind in kinds)
    null = " or null" if types.NoneType in options else ""
    more = hint_for_text(path, value) if options == (str,) else ""
    return f"{path} must be {expected}{null}, not {'null' if value is None else repr(value)}{more}."


def read(
    mapping: dict[str, Any],
    hints: Hints,
    where: str,
    problems: list[str],
    *,
    exact: bool = False,
    names: dict[Any, str] = NAMES,
    whose: str = "",
    advice: Callable[[str, str, list[str]], str] = lambda path, key, known: nearest(key, known),
    hint_for_text: Callable[[str, Any], str] = lambda path, value: "",
) -> dict[str, Any]:
    """The values of `mapping` as the types that `hints` give its keys; unknown keys and wrong types are left out and told in `problems`.

    where: what stands before a key in a sentence ('train.'). exact: a value must be of its type, instead of being made one where that is safe. names: what types are called.
    whose: says of what an unknown key is none. advice: (path, key, known keys) -> how the sentence for an unknown key ends. hint_for_text:
    (path, value) -> more words where text was wanted. A hint that is a dataclass is read in the same way, into one.
    """
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        path = f"{where}{key}"
        if key not in hints:
            problems.append(f"Unknown key {path!r}{whose}; {advice(path, str(key), list(hints))}")
        elif dataclasses.is_dataclass(hints[key]):
            schema = typing.cast(type, hints[key])
            if isinstance(value, dict):
                inside = typing.get_type_hints(schema)
                values[key] = schema(
                    **read(value, inside, f"{path}.", problems, exact=exact, names=names, advice=advice, hint_for_text=hint_for_text)
                )
            else:
                problems.append(f"{path} must be a group of keys, not {value!r}.")
        else:
            try:
                values[key] = _exactly(value, hints[key]) if exact else _convert(value, hints[key])
            except ValueError:
                problems.append(_wrong_type(path, value, hints[key], names, hint_for_text))
    return values


def from_text(text: str, kind: Any) -> Any:
    """The text of a command line as bool, int, float, str, or list[int] with commas. Raises ValueError that says what it must be."""
    name = NAMES.get(typing.get_origin(kind) or kind, "")
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if typing.get_origin(kind) is list:
            name = "whole numbers with commas between them"
            return [int(part) for part in text.strip("[]").split(",")] if text.strip("[]") else []
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(name) from None


def read_words(
    words: Iterable[str],
    convert: Callable[[str, str], Any],
    known: list[str],
    problems: list[str],
    advice: Callable[[str, list[str]], str] = nearest,
) -> dict[str, Any]:
    """The values of `key=value` words; convert(key, text) gives them, or raises ValueError that says what they must be.
    A key that comes twice is a problem: what it was first given would be lost without a word."""
    values: dict[str, Any] = {}
    given: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if key in known and not equals:
            problems.append(f"The argument {word!r} has no value; write {key}=VALUE.")
            continue
        if key not in known:
            problems.append(f"Unknown argument {word!r}; {advice(key, known)}")
            continue
        if key in given:
            problems.append(f"{key} is given twice; the first would be lost, so give it once.")
            continue
        given.add(key)
        try:
            values[key] = convert(key, text if key in SPOKEN else at_home(text))
        except ValueError as error:
            problems.append(f"{key} must be {error}, not {text!r}.")
    return values


def arguments_of(words: Iterable[str], schema: type, problems: list[str], advice: Callable[[str, list[str]], str] = nearest) -> Any:
    """An instance of the dataclass `schema` from `key=value` words, each read as the type of its field; mistakes are told in `problems`."""
    hints = typing.get_type_hints(schema)
    return schema(**read_words(words, lambda key, text: from_text(text, hints[key]), list(hints), problems, advice))
