"""Clipping by the norm of all gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kernels.tensor_lists import total_norm, use_triton
from training.optim.adamw import SkippableAdamW
from training.optim.muon import MuonWithAdamW

EPS = 1e-6  # as torch.nn.utils.clip_grads_with_norm_ adds to the norm
LARGEST = torch.finfo(torch.float32).max  # divisor: beyond, the device would leave out a step that the host counts as made


def norm_ahead(
    parameters: Iterable[nn.Parameter], optimizer: SkippableAdamW | MuonWithAdamW, limit: float, loss: Tensor | None = None
) -> Tensor | None:
    """Clips gradients that are whole on every rank (ZeRO does it in its step), without waiting for the device: returns their norm before that, as it
    will be behind the passes that make them; limit 0: none is clipped. They stay as they are, and the optimizer divides them as it reads them: to the
    rounding of a division the same, and a pass over memory less. None where they have to be changed, which `clip` does. The divisor is
    not finite where the norm is not, or the loss if it is given, and nowhere else."""
    gradients, optimizer.grad_scale = [p.grad for p in parameters if p.grad is not None], None
    if not use_triton(gradients):
        return None
    norm = total_norm(gradients)
    if limit:
        optimizer.grad_scale = torch.add(((norm + EPS) / limit).clamp(1.0, LARGEST), norm, alpha=0)
    if loss is not None:
        divisor = 1.0 + 0.0 * norm if optimizer.grad_scale is None else optimizer.grad_scale
        optimizer.grad_scale = torch.add(divisor, loss, alpha=0).to(divisor.dtype)  # of fp64, whose sums of losses may be beyond fp32
    return norm


def clip(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """`norm_ahead` where gradients are changed in place: clips them and returns their norm before that."""
    read = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in read if p.grad is not None])
    if limit:
        nn.utils.clip_grads_with_norm_(read, limit, norm)
    return float(norm)
