"""Clipping by the norm of all gradients."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from kernels.tensor_lists import total_norm, use_triton
from training.optim.adamw import SkippableAdamW
from training.optim.muon import MuonWithAdamW

EPS = 1e-6  # as torch.nn.utils.clip_grads_with_norm_ adds to the norm


def clip(parameters: Iterable[nn.Parameter], optimizer: SkippableAdamW | MuonWithAdamW, limit: float) -> float:
    """Clips gradients that are whole on every rank (ZeRO does it in its step) and returns their norm before that; limit 0: none. On a GPU they stay
    as they are, and the optimizer divides them as it reads them: to the rounding of a division the same, and a pass over memory less."""
    read = [p for p in parameters if p.grad is not None]
    norm = norm_ahead(read, optimizer, limit)
    if norm is None:
        norm = nn.utils.get_total_norm([p.grad for p in read if p.grad is not None])
        if limit:
            nn.utils.clip_grads_with_norm_(read, limit, norm)
    return float(norm)


def norm_ahead(parameters: Iterable[nn.Parameter], optimizer: SkippableAdamW | MuonWithAdamW, limit: float) -> Tensor | None:
    """`clip` without waiting for the device: the norm as it will be, behind the passes that make the gradients. None where these have to be changed."""
    gradients, optimizer.grad_scale = [p.grad for p in parameters if p.grad is not None], None
    if not use_triton(gradients):
        return None
    norm = total_norm(gradients)
    if limit:
        optimizer.grad_scale = ((norm + EPS) / limit).clamp(min=1.0)
    return norm
