"""Launches the kernels of the short convolution; imports Triton, so it is imported when a kernel is first wanted.

Legend: B batch, T time, D channels, W width, H = W-1 inputs of history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.parts import summed
from kernels.short_conv import triton as kernels

BLOCK, UNROLL, SLICE = 256, 8, 64  # channels a program, rows loaded ahead, steps of a slice
BLOCK_BACK, UNROLL_BACK, SLICE_BACK = 128, 4, 128
PER_WARP = 256  # channels of a warp
PROGRAMS, SHORTEST = 1024, 16  # programs wanted before slices are longer than this


def channels_last(x: Tensor) -> Tensor:
    """Strides over batch and time are free; channels must be neighbours."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Plan:
    """Channels, warps, rows loaded ahead, steps a slice, slices: long slices read less twice, short ones make more programs."""

    def __init__(self, B: int, T: int, D: int, device: torch.device, back: bool) -> None:
        block, self.unroll, longest = (BLOCK_BACK, UNROLL_BACK, SLICE_BACK) if back else (BLOCK, UNROLL, SLICE)
        self.block = min(block, max(16, 1 << (D - 1).bit_length()))
        if device.type == "cpu":  # the interpreter pays for every statement
            self.block, self.unroll, longest = 16, 2, 8
        self.warps = max(1, self.block // PER_WARP)
        self.blocks = -(-D // self.block)
        steps = min(T, longest, max(SHORTEST, B * T * self.blocks // PROGRAMS))
        self.steps = -(-steps // self.unroll) * self.unroll
        self.slices = -(-T // self.steps)


def _arguments(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, silu: bool
) -> tuple[Any, dict[str, Any]]:
    past = x if history is None else channels_last(history)
    reset = x if starts is None else starts.contiguous().view(torch.uint8)
    flags = {"W": weight.shape[1], "SILU": silu, "HAS_HISTORY": history is not None, "HAS_STARTS": starts is not None}
    return (x, past, weight.contiguous(), bias.contiguous(), reset), flags


def convolve(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, silu: bool) -> Tensor:
    """y (B, T, D), contiguous, in x's dtype; T >= 1."""
    x = channels_last(x)
    B, T, D = x.shape
    plan = Plan(B, T, D, x.device, back=False)
    tensors, flags = _arguments(x, history, weight, bias, starts, silu)
    y = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
    past = tensors[1]
    kernels.forward[(plan.blocks * plan.slices * B,)](
        *tensors, y, T, D, plan.steps, plan.slices, x.stride(0), x.stride(1), past.stride(0), past.stride(1),
        **flags, U=plan.unroll, BD=plan.block, num_warps=plan.warps,
    )  # fmt: skip
    return y


def convolve_backward(
    dy: Tensor, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, silu: bool, dx: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x (written into `dx` if given: free strides, channels neighbours), history, weight and bias."""
    x, dy = channels_last(x), channels_last(dy)
    (B, T, D), W = x.shape, weight.shape[1]
    plan = Plan(B, T, D, x.device, back=True)
    tensors, flags = _arguments(x, history, weight, bias, starts, silu)
    dx = torch.empty(B, T, D, dtype=x.dtype, device=x.device) if dx is None else dx
    d_history = None if history is None else torch.empty(B, W - 1, D, dtype=history.dtype, device=x.device)
    partial = torch.empty(B * plan.slices, W + 1, D, dtype=torch.float32, device=x.device)
    past = tensors[1]
    kernels.backward[(plan.blocks * plan.slices * B,)](
        *tensors, dy, dx, dx if d_history is None else d_history, partial, T, D, plan.steps, plan.slices,
        x.stride(0), x.stride(1), past.stride(0), past.stride(1), dy.stride(0), dy.stride(1), dx.stride(0), dx.stride(1),
        **flags, U=plan.unroll, BD=plan.block, num_warps=plan.warps,
    )  # fmt: skip
    total = summed(partial)
    return dx, d_history, total[:W].T.to(weight.dtype).contiguous(), total[W].to(bias.dtype, copy=True)
