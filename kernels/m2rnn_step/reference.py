"""One token through the convolution and the recurrence of an M2RNN layer in plain torch, in float64 if its inputs are: the oracle, and what runs
where the kernel cannot.

Legend: as in __init__.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.m2rnn.reference import m2rnn_sequential
from kernels.short_conv.reference import last_inputs, short_conv


def m2rnn_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, state_weight_HVV: Tensor, skip_HV: Tensor,
    m2rnn_BHKV: Tensor, starts_B: Tensor | None, groups: int, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o (B, H V), the next past, the next state); arguments as of `kernels.m2rnn_step.m2rnn_step`."""
    (_, H, K, V), (C, W), G = m2rnn_BHKV.shape, weight_CW.shape, groups
    inner = torch.promote_types(projected_BE.dtype, torch.float32)
    _, qkv, gate = projected_BE[:, None].split([projected_BE.shape[1] - C - H, C, H], -1)
    starts, past = None if starts_B is None else starts_B[:, None], past_BWC.to(projected_BE.dtype)
    mixed = short_conv(qkv, past, weight_CW, weight_CW.new_zeros(C), starts, silu=True)
    q, k, v = mixed.split([G * K, G * K, H * V], -1)
    g = -torch.exp(A_log_H.to(inner)) * F.softplus(gate.to(inner) + dt_bias_H.to(inner))
    heads = q.unflatten(-1, (G, K)), k.unflatten(-1, (G, K)), v.unflatten(-1, (H, V))
    with torch.autocast(projected_BE.device.type, enabled=False):
        o, state = m2rnn_sequential(*heads, g, state_weight_HVV, m2rnn_BHKV, starts)
        o = (o + skip_HV.to(inner) * heads[2].to(inner)).to(projected_BE.dtype)
    return o[:, 0].flatten(1), last_inputs(qkv, past, W, starts), m2rnn_BHKV.copy_(state) if in_place else state
