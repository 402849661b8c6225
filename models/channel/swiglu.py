"""The plain channel mixer: SwiGLU of dense maps."""

from __future__ import annotations

from dataclasses import dataclass

from models.layers import SwiGLU


@dataclass
class Config:
    def problems(self, d_model: int, d_ff: int) -> list[str]:
        return []


class Channel(SwiGLU):
    def __init__(self, config: Config, d_model: int, d_ff: int) -> None:
        super().__init__(d_model, d_ff)
