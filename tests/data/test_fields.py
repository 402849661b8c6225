"""Settings from mappings and words: which values pass for which type, and what a mistake is told."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any

import pytest

from data.fields import arguments_of, nearest, read


@dataclass
class Inner:
    rate: float = 1.0


@dataclass
class Outer:
    steps: int = 1
    name: str = "a"
    on: bool = False
    some: int | None = None
    lengths: list[int] = field(default_factory=list)
    free: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@dataclass
class Words:
    steps: int = 1
    rate: float = 0.5
    on: bool = False
    lengths: list[int] = field(default_factory=list)
    name: str = ""


HINTS = typing.get_type_hints(Outer)


@pytest.mark.parametrize(
    "mapping,values",
    [
        ({"steps": 1e6, "name": 7, "some": None, "lengths": (1, 2.0)}, {"steps": 1000000, "name": "7", "some": None, "lengths": [1, 2]}),
        ({"inner": {"rate": "3e-4"}, "free": {"a": [1]}, "on": True}, {"inner": Inner(3e-4), "free": {"a": [1]}, "on": True}),
    ],
)
def test_what_is_safe_is_made_the_type_that_is_wanted(mapping: dict[str, Any], values: dict[str, Any]) -> None:
    problems: list[str] = []
    got = read(mapping, HINTS, "", problems)
    assert problems == [] and got == values and [type(v) for v in got.values()] == [type(v) for v in values.values()]


@pytest.mark.parametrize(
    "key,value,sentence",
    [
        ("steps", 1.5, "x.steps must be a whole number, not 1.5."),
        ("steps", True, "x.steps must be a whole number, not True."),
        ("steps", float("inf"), "x.steps must be a whole number, not inf."),
        ("steps", None, "x.steps must be a whole number, not null."),
        ("some", "many", "x.some must be a whole number or null, not 'many'."),
        ("on", 1, "x.on must be true or false, not 1."),
        ("lengths", [1, "b"], "x.lengths[1] must be a whole number, not 'b'."),
        ("lengths", 3, "x.lengths must be a list, not 3."),
        ("free", [1], "x.free must be a group of keys, not [1]."),
        ("inner", 3, "x.inner must be a group of keys, not 3."),
        ("inner", {"rate": "fast"}, "x.inner.rate must be a number, not 'fast'."),
        ("inner", {"rte": 1}, "Unknown key 'x.inner.rte'; did you mean 'rate'?"),
        ("zzz", 1, "Unknown key 'x.zzz'; known keys are free, inner, lengths, name, on, some, steps."),
    ],
)
def test_a_mistake_is_left_out_and_told(key: str, value: Any, sentence: str) -> None:
    problems: list[str] = []
    assert read({key: value}, HINTS, "x.", problems).get(key, Inner()) == Inner() and problems == [sentence]


def test_exactly_makes_nothing_of_anything() -> None:
    problems: list[str] = []
    values = read({"steps": 2.0, "name": 7, "some": 3, "on": True}, HINTS, "", problems, exact=True, names={})
    assert values == {"some": 3, "on": True}
    assert problems == ["steps must be of type int, not 2.0.", "name must be of type str, not 7."]
    assert read({"rate": 1}, {"rate": float}, "", problems, exact=True) == {"rate": 1}


def test_words_are_read_as_the_fields_types() -> None:
    problems: list[str] = []
    words = ["steps=-3", "rate=1e-3", "on=True", "lengths=[4, 7]", "name=a=b"]
    assert arguments_of(words, Words, problems) == Words(-3, 1e-3, True, [4, 7], "a=b") and not problems
    assert arguments_of(["steps=x", "on=yes", "lengths=1,,2", "nme=a", "name"], Words, problems) == Words()
    assert problems == [
        "steps must be a whole number, not 'x'.",
        "on must be true or false, not 'yes'.",
        "lengths must be whole numbers with commas between them, not '1,,2'.",
        "Unknown argument 'nme=a'; did you mean 'name'?",
        "The argument 'name' has no value; write name=VALUE.",
    ]
    assert nearest("q", ["b", "a"], known_as="choose one of") == "choose one of a, b."
