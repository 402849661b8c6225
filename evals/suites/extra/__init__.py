"""Suites of one measurement, a file each: suite=NAME runs it. A file defines `settings(subject)`, what its result depends on beside the model and its
text, and `measure(subject, progress)`, a JSON-able result with a `summary` in one line. Both get the Subject of evals/suites/subject.py."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def available() -> list[str]:
    """Names of the suites that lie here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The file of a suite."""
    return importlib.import_module(f"{__name__}.{name}")
