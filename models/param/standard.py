"""The plain parametrisation: every hidden matrix starts with init_std, and all parameters have one learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.lm import LanguageModel


@dataclass
class Config:
    def problems(self, model: ModelConfig) -> list[str]:
        return []


def hidden_std(model: ModelConfig, config: Config) -> float:
    return model.init_std


def prepare(model: LanguageModel, config: Config, drawn: bool) -> None:
    pass
