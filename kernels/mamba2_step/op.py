"""The op everywhen::mamba2_step, which has no gradient.

Legend: B rows, C channels of the convolution, W its width, H heads, P head width, G groups, N state width.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.op import define

TILE = 4096  # elements of a state a program holds, 32 registers a thread; twice as many spill
PROGRAMS = 512  # wanted before tiles are that large


def tile(B: int, H: int, P: int, N: int) -> tuple[int, int]:
    """(rows, columns) of a head's state that a program owns: all columns; rows enough for its warps, fewer where programs would be few."""
    rows, columns = 1 << (P - 1).bit_length(), 1 << (N - 1).bit_length()
    if interpreted():  # which pays for every statement of every program
        return rows, columns
    while rows > 1 and (rows * columns > TILE or (rows > 16 and B * H * -(-P // rows) < PROGRAMS)):
        rows //= 2
    return rows, columns


def _forward(
    projected: Tensor, past: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, ssm: Tensor,
    starts: Tensor | None, after: Tensor, groups: int, low: float, high: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y (B, H P), the next past (B, W-1, C)); the next state is written into `after`."""
    from kernels.mamba2_step.triton import step as kernel

    rows = projected if projected.stride(-1) == 1 else projected.contiguous()
    (B, H, P, N), (C, W) = ssm.shape, weight.shape
    y, following = rows.new_empty(B, H * P), rows.new_empty(B, W - 1, C)
    BP, BN = tile(B, H, P, N)
    flags = ssm if starts is None else starts.contiguous().view(torch.uint8)
    kernel[(B * H * -(-P // BP),)](
        rows, past.contiguous(), weight.contiguous(), *(t.contiguous() for t in (bias, dt_bias, A_log, D, ssm)), flags, y, following, after,
        H, P, N, groups, C, rows.stride(0), low, high, HAS_STARTS=starts is not None, W=W, BP=BP, BN=BN, num_warps=4,
    )  # fmt: skip
    return y, following


def _fake(projected: Tensor, past: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (B, H, P, _), (C, W) = others[4].shape, weight.shape
    return projected.new_empty(B, H * P), projected.new_empty(B, W - 1, C)


step, step_op = define("mamba2_step", _forward, _fake, mutates=("after",))
