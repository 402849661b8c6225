"""Gradients as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Config:
    def problems(self, run: Any) -> list[str]:
        return []


def wrap(engine: Any, config: Config) -> None:
    pass
