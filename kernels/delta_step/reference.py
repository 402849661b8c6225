"""One token through the convolution and the recurrence of a layer of the delta rule in plain torch, in float64 if its inputs are: the oracle, and
what runs where the kernel cannot.

Legend: as in __init__.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule.reference import delta_rule_step
from kernels.short_conv.reference import last_inputs, short_conv


def delta_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, dt_bias_H: Tensor | None, A_log_H: Tensor | None, delta_BHVK: Tensor,
    starts_B: Tensor | None, groups: int, updates: int, strength: float, scale: float, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o (B, H V), the next past, the next state); arguments as of `kernels.delta_step.delta_step`."""
    (_, H, V, K), (C, W), n, G = delta_BHVK.shape, weight_CW.shape, updates, groups
    inner = torch.promote_types(projected_BE.dtype, torch.float32)
    gates = 0 if dt_bias_H is None else H
    _, qkv, beta, a = projected_BE[:, None].split([projected_BE.shape[1] - C - n * H - gates, C, n * H, gates], -1)
    starts, past = None if starts_B is None else starts_B[:, None], past_BWC.to(projected_BE.dtype)
    mixed = short_conv(qkv, past, weight_CW, weight_CW.new_zeros(C), starts, silu=True)
    q, k, v = mixed.split([G * K, n * G * K, n * H * V], -1)
    b_BSH = strength * torch.sigmoid(beta.to(inner)).view(-1, n, H)
    g = None
    if dt_bias_H is not None and A_log_H is not None:
        g = -torch.exp(A_log_H.to(inner)) * F.softplus(a.to(inner) + dt_bias_H.to(inner))
    heads = q.unflatten(-1, (G, K)), k.reshape(-1, n, G, K), v.reshape(-1, n, H, V)
    with torch.autocast(projected_BE.device.type, enabled=False):
        o, delta = delta_rule_step(*heads, b_BSH, g, delta_BHVK, starts, True, scale)
    return o.flatten(1), last_inputs(qkv, past, W, starts), delta_BHVK.copy_(delta) if in_place else delta
