"""mamba2_step: what lies between the two projections of a Mamba-2 layer, for one token: decoding at any number of rows.

For few rows whole layers are fused further (kernels/decode_step). Legend: B rows, E width of the projection, I inner width,
C = I + 2 G N channels of the convolution, W its width, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.mamba2_step import op, reference


def mamba2_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, bias_C: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor,
    ssm_BHPN: Tensor, starts_B: Tensor | None, groups: int, low: float, high: float, *, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y (B, I) in projected's dtype, the next past (B, W-1, C), the next ssm), not differentiable.

    projected (B, I + C + H): the gate, which is not read, then x, B and C, then dt. The convolution with silu, dt = softplus(. + dt_bias)
    clamped to [low, high], h = exp(-dt exp(A_log)) h + dt x B^T and y = C h + D x per head, as in `kernels.ssd.ssd`. starts (B,) bool: a
    document starts with this token. in_place: ssm is written over, and is the next one.
    """
    if projected_BE.dtype == torch.float64 or weight_CW.shape[1] < 2 or no_triton(projected_BE.device):
        return reference.mamba2_step(
            projected_BE, past_BWC, weight_CW, bias_C, dt_bias_H, A_log_H, D_H, ssm_BHPN, starts_B, groups, low, high, in_place=in_place
        )
    whole = in_place and ssm_BHPN.is_contiguous() and ssm_BHPN.dtype == torch.float32  # else the kernel writes a tensor of its own
    after = ssm_BHPN if whole else torch.empty(ssm_BHPN.shape, dtype=torch.float32, device=ssm_BHPN.device)
    y, following = op.step(projected_BE, past_BWC, weight_CW, bias_C, dt_bias_H, A_log_H, D_H, ssm_BHPN, starts_B, after, groups, low, high)
    return y, following, ssm_BHPN.copy_(after) if in_place and not whole else after
