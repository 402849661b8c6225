"""The op everywhen::delta_step, which has no gradient, and the launch that a fused step of a layer shares with it.

Legend: B rows, C channels of the convolution, W its width, H heads of values, V value width, K key width, G groups, n updates.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule.reference import NORM_EPS
from kernels.dispatch import interpreted, no_triton, overlapped
from kernels.op import define

TILE = 4096  # elements of a state a program holds, 32 registers a thread
PROGRAMS = 512  # wanted before tiles are that large


def usable(device: torch.device) -> bool:
    """Whether the kernel takes a token on this device."""
    return not no_triton(device)


def tile(B: int, H: int, V: int, K: int) -> tuple[int, int]:
    """(rows, columns) of a head's state that a program owns: all columns; rows enough for its warps, fewer where programs would be few."""
    rows, columns = 1 << (V - 1).bit_length(), 1 << (K - 1).bit_length()
    if interpreted():  # which pays for every statement of every program
        return rows, columns
    while rows > 1 and (rows * columns > TILE or (rows > 16 and B * H * -(-V // rows) < PROGRAMS)):
        rows //= 2
    return rows, columns


def launch(
    rows_BE: Tensor, past: Tensor | None, weight: Tensor | None, dt_bias: Tensor | None, A_log: Tensor | None, delta: Tensor, starts: Tensor | None,
    o: Tensor, following: Tensor | None, after: Tensor, sizes: tuple[int, int, int], strength: float, scale: float, chained: bool = False,
) -> None:  # fmt: skip
    """Runs the kernel on rows that begin with the convolution's channels, or, without `weight`, with its outputs. sizes: groups, updates and C.
    chained: rows are what the kernel before this one wrote, which may still run."""
    from kernels.delta_step.triton import step as kernel

    (B, H, V, K), (groups, updates, C) = delta.shape, sizes
    W = 0 if weight is None else weight.shape[1]
    BV, BK = tile(B, H, V, K)
    flags = delta if starts is None else starts.contiguous().view(torch.uint8)
    unread = [delta if t is None else t for t in (past, weight, dt_bias, A_log, following)]
    options = {"PDL": True, "launch_pdl": True} if chained and overlapped() else {"PDL": False}
    with torch.cuda.device_of(rows_BE):  # Triton launches on the current device
        kernel[(B * H * -(-V // BV),)](
            rows_BE, *unread[:4], delta, flags, o, unread[4], after, H, V, K, groups, updates, C, rows_BE.stride(0), NORM_EPS, strength, scale,
            HAS_STARTS=starts is not None, GATED=dt_bias is not None, W=W, BV=BV, BK=BK, num_warps=4, **options,
        )  # fmt: skip


def _forward(
    projected: Tensor, past: Tensor, weight: Tensor, dt_bias: Tensor | None, A_log: Tensor | None, delta: Tensor, starts: Tensor | None,
    after: Tensor, groups: int, updates: int, strength: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o (B, H V), the next past (B, W-1, C)); the next state is written into `after`."""
    (B, H, V, _), (C, W) = delta.shape, weight.shape
    used = C + (updates + (dt_bias is not None)) * H
    rows = (projected if projected.stride(-1) == 1 else projected.contiguous())[:, projected.shape[1] - used :]
    o, following = rows.new_empty(B, H * V), rows.new_empty(B, W - 1, C)
    dt_bias, A_log = (None if t is None else t.contiguous() for t in (dt_bias, A_log))
    kept = past.contiguous(), weight.contiguous(), dt_bias, A_log, delta.contiguous()
    launch(rows, *kept, starts, o, following, after, (groups, updates, C), strength, scale)
    return o, following


def _fake(projected: Tensor, past: Tensor, weight: Tensor, dt_bias: Any, A_log: Any, delta: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    (B, H, V, _), (C, W) = delta.shape, weight.shape
    return projected.new_empty(B, H * V), projected.new_empty(B, W - 1, C)


step, step_op = define("delta_step", _forward, _fake, mutates=("after",))
