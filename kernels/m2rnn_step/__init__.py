"""m2rnn_step: what lies between the two projections of an M2RNN layer but its norm, for one token: decoding at any number of rows.

Legend: B rows, E width of the projection, C channels of the convolution, W its width, H heads of values, G of queries and keys, K key width,
V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.m2rnn_step import op, reference


def m2rnn_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, state_weight_HVV: Tensor, skip_HV: Tensor,
    m2rnn_BHKV: Tensor, starts_B: Tensor | None, groups: int, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o (B, H V) in projected's dtype, the next past (B, W-1, C), the next state), not differentiable.

    The last columns of projected (B, E) are those of the convolution (queries, keys, values) and the gate of each head; columns before them are not
    read. The convolution with silu, log f = -exp(A_log) softplus(. + dt_bias), the step of `kernels.m2rnn`, and skip v added to its output.
    starts (B,) bool: a document starts with this token. in_place: m2rnn is written over, and is the next state.
    """
    arguments = (projected_BE, past_BWC, weight_CW, dt_bias_H, A_log_H, state_weight_HVV, skip_HV, m2rnn_BHKV, starts_B)
    if projected_BE.dtype == torch.float64 or weight_CW.shape[1] < 2 or no_triton(projected_BE.device) or m2rnn_BHKV.shape[3] > op.WIDEST:
        return reference.m2rnn_step(*arguments, groups, in_place)
    whole = in_place and m2rnn_BHKV.is_contiguous() and m2rnn_BHKV.dtype == torch.float32  # else the kernel writes a tensor of its own
    after = m2rnn_BHKV if whole else torch.empty(m2rnn_BHKV.shape, dtype=torch.float32, device=m2rnn_BHKV.device)
    o, following = op.step(*arguments, after, groups)
    return o, following, m2rnn_BHKV.copy_(after) if in_place and not whole else after
