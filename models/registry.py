"""Kinds that lie in a folder, one file each: what says `{type: FILE, key: value}` in a config is looked up, read and checked here.

A file of such a folder defines a dataclass `Config` whose `problems(...)` lists what is wrong with its values in sentences, and whatever else its
folder asks for. A kind is there as soon as its file is, and gone with it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import typing
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from data.errors import UserError
from data.fields import nearest, read


@dataclass(frozen=True)
class Registry:
    """package: the folder as a module; key: where its config lies in a run's settings; needs: what a file has to define beside Config."""

    package: str
    key: str
    needs: tuple[str, ...]

    def available(self) -> list[str]:
        """The kinds found on disk."""
        return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__))

    def load(self, type_: str) -> ModuleType:
        """The file of a kind. Raises UserError for an unknown one, and for a file that is none."""
        known = self.available()
        if type_ not in known:
            raise UserError(f"{self.key}.type is {type_!r}: {nearest(type_, known, known_as=f'{self.package} holds')}")
        module = importlib.import_module(f"{self.package}.{type_}")
        lacking = [name for name in ("Config", *self.needs) if not hasattr(module, name)]
        if lacking:
            raise UserError(f"{self.package}.{type_} defines no {lacking[0]}; the other files of its folder show one.")
        return module

    def parse(self, mapping: dict[str, Any], *context: Any) -> tuple[Any, list[str]]:
        """(the Config or None, problems in sentences) of a mapping; context: what `Config.problems` is given."""
        try:
            schema = self.load(str(mapping.get("type"))).Config
        except UserError as error:
            return None, error.problems
        problems: list[str] = []
        settings = {key: value for key, value in mapping.items() if key != "type"}
        values = read(settings, typing.get_type_hints(schema), f"{self.key}.", problems, exact=True, names={})
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{self.key}.{key} must be a finite number, not {value}.")
        if problems:
            return None, problems
        config = schema(**values)
        problems = [f"{self.key}.{problem}" for problem in config.problems(*context)]
        return None if problems else config, problems

    def settled(self, mapping: dict[str, Any], *context: Any) -> tuple[ModuleType, Any]:
        """(file, Config) of a mapping. Raises UserError with every problem."""
        config, problems = self.parse(mapping, *context)
        if problems:
            raise UserError(problems)
        return self.load(mapping["type"]), config
