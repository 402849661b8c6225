"""delta_step: what lies between the two projections of a layer of the delta rule but its norm, for one token: decoding at any number of rows.

Legend: B rows, E width of the projection, C channels of the convolution, W its width, H heads of values, G of queries and keys, V value width,
K key width, n updates of the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_step import op, reference


def delta_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, dt_bias_H: Tensor | None, A_log_H: Tensor | None, delta_BHVK: Tensor,
    starts_B: Tensor | None, groups: int, updates: int, strength: float, scale: float, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o (B, H V) in projected's dtype, the next past (B, W-1, C), the next state), not differentiable.

    The last columns of projected (B, E) are those of the convolution (queries, keys and values, of all updates), b of each update and head and,
    with dt_bias, that of the gate of each head; columns before them are not read. The convolution with silu, keys and queries of norm 1,
    b = strength sigmoid(.), a = exp(-exp(A_log) softplus(. + dt_bias)), and the rule of `kernels.delta_rule`. starts (B,) bool: a document starts
    with this token. in_place: delta is written over, and is the next state.
    """
    arguments = (projected_BE, past_BWC, weight_CW, dt_bias_H, A_log_H, delta_BHVK, starts_B)
    settings = (groups, updates, strength, scale)
    if (
        projected_BE.dtype == torch.float64
        or weight_CW.shape[1] < 2
        or not op.usable(projected_BE.device)
        or delta_BHVK.shape[-1] > op.TILE
    ):
        return reference.delta_step(*arguments, *settings, in_place)
    whole = in_place and delta_BHVK.is_contiguous() and delta_BHVK.dtype == torch.float32  # else the kernel writes a tensor of its own
    after = delta_BHVK if whole else torch.empty(delta_BHVK.shape, dtype=torch.float32, device=delta_BHVK.device)
    o, following = op.step(*arguments, after, *settings)
    return o, following, delta_BHVK.copy_(after) if in_place and not whole else after
