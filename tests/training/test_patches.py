"""Every patch of DeepSpeed finds, in the release that is installed, what it patches."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest

from training.zero import patches


def source_of(place: str) -> str:
    """The source of "module" or "module:object" of DeepSpeed, read from its files: importing all of them would take seconds."""
    module, _, path = place.partition(":")
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    text = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text()
    node: ast.AST = ast.parse(text)
    for name in path.split(".") if path else []:
        node = next(item for item in ast.iter_child_nodes(node) if getattr(item, "name", "") == name)
    return (ast.get_source_segment(text, node) or "") if path else text


@pytest.mark.parametrize("patch", patches.FINDS)
def test_a_patch_finds_what_it_patches(patch: str) -> None:
    assert inspect.getdoc(getattr(patches, patch)), "a patch gives its reason"
    for place, text in patches.FINDS[patch]:
        assert text in source_of(place), f"DeepSpeed has changed: {place} does not hold {text!r} any more; see whether {patch} is needed"


def test_every_patch_says_where_it_reaches() -> None:
    ours = {name for name, value in vars(patches).items() if inspect.isfunction(value) and value.__module__ == patches.__name__}
    assert ours == set(patches.FINDS)
