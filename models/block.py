"""A pre-norm residual block: sequence mixer, then (optionally) a SwiGLU MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels import decode_step
from kernels.residual import residual
from models import mixers
from models.config import ModelConfig
from models.init import Module, tag
from models.layers import RMSNorm, SwiGLU
from models.segments import Documents


class Block(Module):
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

    def forward(
        self, x_BTD: Tensor, state: Any = None, segment_ids: Tensor | None = None, documents: Documents | None = None
    ) -> tuple[Tensor, Any]:
        """documents: of segment_ids, shared by all layers; without them a mixer that wants them looks for itself."""
        more = {"documents": documents} if self.mixer.takes_documents else {}
        y, state = self.mixer(self.mixer_norm(x_BTD), state, segment_ids, **more)
        x_BTD = self._add(x_BTD, y, 0)
        if self.mlp is not None and self.mlp_norm is not None:
            x_BTD = self._add(x_BTD, self.mlp(self.mlp_norm(x_BTD)), 1)
        return x_BTD, state

    def fused_step(self, x_BD: Tensor, state: Any) -> Callable[[], None] | None:
        """forward over one token, x (fp32) and the state written over, or None: see SequenceMixer.fused_step."""
        keep = [None, None] if self.residual_scale is None else list(self.residual_scale.detach())
        mix = self.mixer.fused_step(x_BD, self.mixer_norm, keep[0], state)
        if mix is None or self.mlp is None:
            return mix
        norm, mlp = self.mlp_norm, self.mlp
        assert norm is not None
        inner_BF = x_BD.new_empty(x_BD.shape[0], mlp.gate.out_features)

        def step() -> None:
            mix()
            decode_step.project(x_BD, mlp.gate.weight, inner_BF, norm_K=norm.weight, eps=norm.eps, pair_NK=mlp.up.weight)
            decode_step.project(inner_BF, mlp.down.weight, x_BD, add=True, keep_N=keep[1])

        return step

    def _add(self, x_BTD: Tensor, y_BTD: Tensor, which: int) -> Tensor:
        return x_BTD + y_BTD if self.residual_scale is None else residual(x_BTD, y_BTD, self.residual_scale[which])

    def init_weights(self, std: float, n_layers: int) -> None:
        self.mixer_norm.init_weights()
        self.mixer.init_weights(std, n_layers)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp_norm.init_weights()
            self.mlp.init_weights(std, n_layers)
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)
