"""One token through Mamba-2's convolution and recurrence in plain torch, in float64 if its inputs are: the oracle, and what runs where the
kernel cannot.

Legend: B rows, E width of the projection, I inner width, C = I + 2 G N channels of the convolution, W its width, H heads, P head width,
G groups, N state width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.short_conv.reference import last_inputs, short_conv
from kernels.ssd.reference import ssd_step


def mamba2_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, bias_C: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor,
    ssm_BHPN: Tensor, starts_B: Tensor | None, groups: int, low: float, high: float, *, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y (B, I), the next past, the next ssm); arguments as of `kernels.mamba2_step.mamba2_step`."""
    (_, H, P, N), C = ssm_BHPN.shape, weight_CW.shape[0]
    inner = torch.promote_types(projected_BE.dtype, torch.float32)
    xBC, dt = projected_BE[:, None].split([H * P, C, H], -1)[1:]
    starts = None if starts_B is None else starts_B[:, None]
    past = past_BWC.to(projected_BE.dtype)
    mixed = short_conv(xBC, past, weight_CW, bias_C, starts, silu=True)
    x, B_, C_ = mixed.split([H * P, groups * N, groups * N], -1)
    dt_BTH = F.softplus(dt.to(inner) + dt_bias_H.to(inner)).clamp(low, high)
    A_H = -torch.exp(A_log_H.to(inner))
    B_BTGN, C_BTGN = B_.unflatten(-1, (groups, N)), C_.unflatten(-1, (groups, N))
    with torch.autocast(projected_BE.device.type, enabled=False):
        y, ssm = ssd_step(x.unflatten(-1, (H, P)), dt_BTH, A_H, B_BTGN, C_BTGN, ssm_BHPN, starts, D_H.to(inner))
    return y.flatten(1), last_inputs(xBC, past, weight_CW.shape[1], starts), ssm_BHPN.copy_(ssm) if in_place else ssm
