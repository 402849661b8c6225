"""What updates the weights: AdamW for all of them (adamw), or Muon for the hidden matrices and AdamW for the rest (muon)."""

from __future__ import annotations

from typing import Any

from torch import nn

from training.config.schema import Config
from training.optim.adamw import SkippableAdamW, build_optimizer, parameter_groups
from training.optim.muon import MuonWithAdamW
from training.world import World

__all__ = ["MuonWithAdamW", "SkippableAdamW", "build_optimizer", "optimizer_of", "parameter_groups"]


def optimizer_of(config: Config, model: nn.Module, world: World) -> SkippableAdamW | MuonWithAdamW:
    """The optimizer that `config.optim` asks for, over `model`, which lies where it is to be trained."""
    o = config.optim
    adamw: dict[str, Any] = {"lr": config.peak_lr, "betas": (o.betas[0], o.betas[1]), "eps": o.eps, "weight_decay": o.weight_decay}
    if o.kind == "adamw":
        return build_optimizer(model, **adamw)
    return MuonWithAdamW(
        model,
        **adamw,
        muon_lr=o.muon_lr or config.peak_lr,
        momentum=o.momentum,
        nesterov=o.nesterov,
        steps=o.newton_schulz_steps,
        scale=o.update_scale,
        rank=world.rank,
        size=world.size,
    )
