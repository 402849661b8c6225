"""mamba2_step: what lies between the two projections of a Mamba-2 layer, for one token: decoding at any number of rows.

For few rows whole layers are fused further (kernels/decode_step). Legend: B rows, E width of the projection, I inner width,
C = I + 2 G N channels of the convolution, W its width, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from kernels.dispatch import interpreted, no_triton
from kernels.mamba2_step import reference

TILE = 4096  # elements of a state a program holds, 32 registers a thread; twice as many spill
PROGRAMS = 512  # wanted before tiles are that large


def mamba2_step(
    projected_BE: Tensor, past_BWC: Tensor, weight_CW: Tensor, bias_C: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor,
    ssm_BHPN: Tensor, starts_B: Tensor | None, groups: int, low: float, high: float, in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y (B, I) in projected's dtype, the next past (B, W-1, C), the next ssm), not differentiable.

    projected (B, I + C + H): the gate, which is not read, then x, B and C, then dt. The convolution with silu, dt = softplus(. + dt_bias)
    clamped to [low, high], h = exp(-dt exp(A_log)) h + dt x B^T and y = C h + D x per head, as in `kernels.ssd.ssd`. starts (B,) bool: a
    document starts with this token. in_place: ssm is written over, and is the next one.
    """
    if projected_BE.dtype == torch.float64 or weight_CW.shape[1] < 2 or no_triton(projected_BE.device):
        return reference.mamba2_step(
            projected_BE, past_BWC, weight_CW, bias_C, dt_bias_H, A_log_H, D_H, ssm_BHPN, starts_B, groups, low, high, in_place
        )
    whole = in_place and ssm_BHPN.is_contiguous() and ssm_BHPN.dtype == torch.float32  # else the kernel writes a tensor of its own
    after = ssm_BHPN if whole else torch.empty(ssm_BHPN.shape, dtype=torch.float32, device=ssm_BHPN.device)
    y, following = _step(projected_BE, past_BWC, weight_CW, bias_C, dt_bias_H, A_log_H, D_H, ssm_BHPN, starts_B, after, groups, low, high)
    return y, following, ssm_BHPN.copy_(after) if in_place and not whole else after


def tile(B: int, H: int, P: int, N: int) -> tuple[int, int]:
    """(rows, columns) of a head's state that a program owns: all columns; rows enough for its warps, fewer where programs would be few."""
    rows, columns = 1 << (P - 1).bit_length(), 1 << (N - 1).bit_length()
    if interpreted():  # which pays for every statement of every program
        return rows, columns
    while rows > 1 and (rows * columns > TILE or (rows > 16 and B * H * -(-P // rows) < PROGRAMS)):
        rows //= 2
    return rows, columns


# ruff: noqa: UP045  (the schema of a custom op is read from these annotations)
@torch.library.custom_op("everywhen::mamba2_step", mutates_args=("after",))
def _step(
    projected: Tensor, past: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, ssm: Tensor,
    starts: Optional[Tensor], after: Tensor, groups: int, low: float, high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from kernels.mamba2_step.triton import step as kernel

    rows = projected if projected.stride(-1) == 1 else projected.contiguous()
    (B, H, P, N), (C, W) = ssm.shape, weight.shape
    y, following = rows.new_empty(B, H * P), rows.new_empty(B, W - 1, C)
    BP, BN = tile(B, H, P, N)
    flags = ssm if starts is None else starts.contiguous().view(torch.uint8)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        kernel[(B * H * -(-P // BP),)](
            rows, past.contiguous(), weight.contiguous(), *(t.contiguous() for t in (bias, dt_bias, A_log, D, ssm)), flags, y, following, after,
            H, P, N, groups, C, rows.stride(0), low, high, HAS_STARTS=starts is not None, W=W, BP=BP, BN=BN, num_warps=4,
        )  # fmt: skip
    return y, following


@_step.register_fake
def _(
    projected: Tensor, past: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, ssm: Tensor,
    starts: Optional[Tensor], after: Tensor, groups: int, low: float, high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, H, P, _), (C, W) = ssm.shape, weight.shape
    return projected.new_empty(B, H * P), projected.new_empty(B, W - 1, C)
