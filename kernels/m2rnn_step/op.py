"""The op everywhen::m2rnn_step, which has no gradient.

Legend: B rows, C channels of the convolution, W its width, H heads of values, G groups, K key width, V value width.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.op import define

ROWS = 16  # of a state that a program takes at a time: so many are multiplied by mma.sync
WIDEST = 128  # columns of a state, and of the weight


def tile(V: int) -> tuple[int, int]:
    """(columns, warps) of a program, which owns a head's state."""
    columns = max(16, 1 << (V - 1).bit_length())
    return columns, columns // 16


def _forward(
    projected: Tensor, past: Tensor, weight: Tensor, dt_bias: Tensor, A_log: Tensor, state_weight: Tensor, skip: Tensor, state: Tensor,
    starts: Tensor | None, after: Tensor, groups: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o (B, H V), the next past (B, W-1, C)); the next state is written into `after`."""
    from kernels.m2rnn_step.triton import step as kernel

    (B, H, K, V), (C, W) = state.shape, weight.shape
    rows = (projected if projected.stride(-1) == 1 else projected.contiguous())[:, projected.shape[1] - C - H :]
    o, following = rows.new_empty(B, H * V), rows.new_empty(B, W - 1, C)
    BV, warps = tile(V)
    flags = state if starts is None else starts.contiguous().view(torch.uint8)
    with torch.cuda.device_of(rows):  # Triton launches on the current device
        kernel[(B * H,)](
            rows, *(t.contiguous() for t in (past, weight, dt_bias, A_log, state_weight, skip, state)), flags, o, following, after,
            H, K, V, groups, C, rows.stride(0), HAS_STARTS=starts is not None, PRECISION="ieee" if interpreted() else "tf32x3", W=W, BK=ROWS, BV=BV,
            num_warps=warps,
        )  # fmt: skip
    return o, following


def _fake(projected: Tensor, past: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (B, H, _, V), (C, W) = others[4].shape, weight.shape
    return projected.new_empty(B, H * V), projected.new_empty(B, W - 1, C)


step, step_op = define("m2rnn_step", _forward, _fake, mutates=("after",))
