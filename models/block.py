"""A pre-norm residual block: sequence mixer, then (optionally) a channel mixer, by default SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.linear import product_dtype
from kernels.residual import residual
from models import channel, mixers, recompute
from models.config import ModelConfig
from models.init import Module, tag
from models.layers import RMSNorm
from models.segments import Documents

Owed = tuple[Tensor, Tensor | None]  # what is to be added to a stream, and by what the stream is scaled before


class Block(Module):
    """x <- s x + mixer(norm(x)), then x <- s' x + mlp(norm(x)); the scales s are learned if `learnable_residual`, else 1. Where `norm_after`
    names the mixer it is s x + norm(mixer(x)) and s' x + norm(mlp(x)) (OLMo 2, arXiv 2501.00656)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d = config.d_model
        self.norm_after = config.mixer_name(layer) in config.norm_after
        self.mixer_norm = RMSNorm(d, config.norm_eps, centred=config.centred_norms)
        self.mixer = mixers.build(config.mixers[config.mixer_name(layer)], d, layer)
        self.mlp_norm = RMSNorm(d, config.norm_eps, centred=config.centred_norms) if config.mlp_width else None
        self.mlp = channel.build(config.channel, d, config.mlp_width) if config.mlp_width else None
        scales = 1 + bool(config.mlp_width)
        self.residual_scale = tag(nn.Parameter(torch.empty(scales, d)), "no_decay") if config.learnable_residual else None
        self.remade: frozenset[str] = frozenset()  # parts whose activations are computed again in training, of models/recompute.py

    def remade_now(self) -> frozenset[str]:
        return self.remade if self.training and torch.is_grad_enabled() else frozenset()

    def within(
        self, x_BTD: Tensor, state: Any, segment_ids: Tensor | None, documents: Documents | None, owed: Owed | None
    ) -> tuple[Tensor, Owed | None, Any]:
        """(x, what this block owes, state) of forward in a stack of blocks: computed again as one where all of it is, which then owes nothing."""
        if "layer" in self.remade_now():
            x_BTD, state = recompute.again(self, x_BTD, state, segment_ids, documents, owed)
            return x_BTD, None, state
        x_BTD, y, scale, state = self(x_BTD, state, segment_ids, documents, owed, owing=True)
        return x_BTD, (y, scale), state

    def forward(
        self,
        x_BTD: Tensor,
        state: Any = None,
        segment_ids: Tensor | None = None,
        documents: Documents | None = None,
        owed: Owed | None = None,
        owing: bool = False,
    ) -> tuple[Any, ...]:
        """(x, state). documents: of segment_ids, shared by all layers; without them a mixer that wants them looks for itself.

        owed: what the block before has still to add to the stream, as (y, scale or None); owing: returns (x, y, scale, state) with
        what this block owes, so that whoever reads the stream next adds and normalises in one pass; not nested, as the hooks by which ZeRO-3 learns
        that gradients are there look for tensors among the results themselves."""
        more = {"documents": documents} if self.mixer.takes_documents else {}
        if self.norm_after:
            x_BTD = x_BTD if owed is None else _added(x_BTD, *owed)
            normed = x_BTD.to(product_dtype(x_BTD))
        elif owed is None:
            x_BTD, normed = self.mixer_norm(x_BTD, beside=True)
        else:
            x_BTD, normed = self.mixer_norm(x_BTD, owed=owed)
        remade = self.remade_now()
        self.mixer.remakes_states = "states" in remade
        mixer = recompute.remaking(self.mixer) if "mixer" in remade else self.mixer
        y, state = mixer(normed, state, segment_ids, **more)
        scales = (None, None) if self.residual_scale is None else self.residual_scale.unbind()
        if self.norm_after:
            x_BTD, y = self._normed_after(x_BTD, y, scales[0], remade)
        elif self.mlp is not None and self.mlp_norm is not None:
            x_BTD, normed = self.mlp_norm(x_BTD, owed=(y, scales[0]))
            y = recompute.mlp(self.mlp, normed, remade)
        scale = scales[-1]
        if owing:  # the parameter may be gone from this rank when the next block runs (ZeRO-3), its copy is not
            return x_BTD, y, None if scale is None else scale.clone(), state
        return _added(x_BTD, y, scale), state

    def _normed_after(self, x_BTD: Tensor, y: Tensor, scale: Tensor | None, remade: frozenset[str]) -> tuple[Tensor, Tensor]:
        """(x, what is still to be added to it) from x and what the mixer gave."""
        y = self.mixer_norm(y)
        if self.mlp is None or self.mlp_norm is None:
            return x_BTD, y
        x_BTD = _added(x_BTD, y, scale)
        return x_BTD, self.mlp_norm(recompute.mlp(self.mlp, x_BTD.to(product_dtype(x_BTD)), remade, last=False))

    def fused_step(self, x_BD: Tensor, state: Any) -> Callable[[], None] | None:
        """forward over one token, x (fp32) and the state written over, or None: see SequenceMixer.fused_step."""
        if self.norm_after:  # the kernels normalise only what they read
            return None
        keep = [None, None] if self.residual_scale is None else list(self.residual_scale.detach())
        mix = self.mixer.fused_step(x_BD, self.mixer_norm, keep[0], state)
        if mix is None or self.mlp is None:
            return mix
        assert self.mlp_norm is not None
        within = self.mlp.fused_step(x_BD, self.mlp_norm, keep[1])
        if within is None:
            return None

        def step() -> None:
            mix()
            within()

        return step

    def flops_per_token(self, T: int) -> int:
        """Forward FLOPs of one token in a sequence of T."""
        return self.mixer.flops_per_token(T) + (0 if self.mlp is None else self.mlp.flops_per_token())

    def recomputed_flops_per_token(self, T: int, parts: frozenset[str]) -> int:
        """Forward FLOPs of one token that are made again where these parts are: of the MLP all but its last product."""
        mixer = (
            self.mixer.flops_per_token(T) if parts & {"mixer", "layer"} else self.mixer.state_flops_per_token() if "states" in parts else 0
        )
        return mixer + (self.mlp.inner_flops_per_token() if self.mlp is not None and parts & {"mlp", "layer"} else 0)

    def init_weights(self, std: float, n_layers: int) -> None:
        self.mixer_norm.init_weights()
        self.mixer.init_weights(std, n_layers)
        if self.mlp is not None and self.mlp_norm is not None:
            self.mlp_norm.init_weights()
            self.mlp.init_weights(std, n_layers)
        if self.residual_scale is not None:
            nn.init.ones_(self.residual_scale)


def _added(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
    """x scale + y, or x + y."""
    return x + y if scale is None else residual(x, y, scale)
