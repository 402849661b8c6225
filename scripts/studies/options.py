"""Checks of what argparse takes for a number or a list of names and a study cannot run: one sentence, exit status 2, before anything is made."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence

from data.fields import nearest


def refuse(
    parser: argparse.ArgumentParser,
    given: argparse.Namespace,
    above_zero: Sequence[str] = (),
    lists: dict[str, Collection[str]] | None = None,
    between: str = ",",
) -> None:
    """Ends the program where one of the options `above_zero` is not, or a name in one of `lists` is not among those known."""
    for name in above_zero:
        if not getattr(given, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above zero, not {getattr(given, name)}.")
    for option, known in (lists or {}).items():
        for name in getattr(given, option).split(between):
            if name not in known:
                parser.error(f"--{option}: {nearest(name, known, known_as='choose from')} (there is no {name!r})")
