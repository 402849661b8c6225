"""A pre-norm residual block: sequence mixer, then (optionally) a SwiGLU MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import mixers
from models.config import ModelConfig
from models.init import tag
from models.layers import RMSNorm, SwiGLU


class Block(nn.Module):
    """x <- s x + mixer(norm(x)), then x <- s' x + mlp(norm(x)); the scales s are learned if `learnable_residual`, else 1."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.mixer_norm = RMSNorm(d, config.norm_eps)
        self.mixer = mixers.build(config.mixers[config.mixer_name(layer)], d, layer)
        self.mlp_norm = RMSNorm(d, config.norm_eps) if config.mlp_width else None
        self.mlp = SwiGLU(d, config.mlp_width) if config.mlp_width else None
        scales = 1 + bool(config.mlp_width)
        self.residual_scale = tag(nn.Parameter(torch.empty(scales, d)), "no_decay") if config.learnable_residual else None

    def forward(self, x_BTD: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x_BTD), state, segment_ids)
        x_BTD = self._keep(x_BTD, 0) + y
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = self._keep(x_BTD, 1) + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD, state

    def _keep(self, x_BTD: Tensor, which: int) -> Tensor:
        return x_BTD if self.residual_scale is None else x_BTD * self.residual_scale[which].to(x_BTD.dtype)

    def init_weights(self, std: float, n_layers: int) -> None:
        self.mixer_norm.init_weights()
        self.mixer.init_weights(std, n_layers)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp_norm.init_weights()
            self.mlp.init_weights(std, n_layers)
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)
