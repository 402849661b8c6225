"""The pictures of README and docs show the code as it is: drawn again they are the same, and what they name is there and joined as drawn."""

from __future__ import annotations

import ast
import functools
import importlib
from pathlib import Path

import pytest

from scripts.draw import ARROWS, BOXES, OUT, Arrow, Box, pictures

ROOT = Path(__file__).resolve().parents[1]


def file_of(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def imports(module: str) -> frozenset[str]:
    """The modules, and names in them, that `module` imports at its top or inside its functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def joined(one: str, other: str) -> bool:
    return one == other or one in imports(other) or other in imports(one)


def test_the_pictures_are_drawn_from_this_code() -> None:
    """If it fails: python -m scripts.draw, and look at what it drew."""
    drawn = pictures()
    assert drawn and {name: (OUT / name).read_text() for name in drawn} == drawn


@pytest.mark.parametrize("box", BOXES, ids=lambda box: box.title)
def test_a_station_of_the_data_is_there(box: Box) -> None:
    assert hasattr(importlib.import_module(box.module), box.name)


@pytest.mark.parametrize("arrow", ARROWS, ids=lambda arrow: f"{arrow.start}-{arrow.end}")
def test_an_arrow_is_what_the_code_does(arrow: Arrow) -> None:
    modules = {box.title: box.module for box in BOXES}
    assert joined(modules[arrow.start], arrow.through) and joined(modules[arrow.end], arrow.through)


def test_every_station_is_on_the_way() -> None:
    assert {box.title for box in BOXES} == {end for arrow in ARROWS for end in (arrow.start, arrow.end)}
    assert not joined("kernels.dispatch", "data.loader")  # the check can fail
