"""The gated norm whose gate is columns of a projection: the gate's gradient is made where the projection's is (kernels/joint.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.joint import JointGradient


class GateOfColumns(torch.autograd.Function):
    """As `op.norm` where kernels run; `first` is the gate's first column of the projection."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, gate: Tensor, weight: Tensor, eps: float, groups: int, norm_first: bool, dtype: torch.dtype, first: int,
        joint: JointGradient,
    ) -> Tensor:  # fmt: skip
        from kernels.gated_norm import launch

        ctx.save_for_backward(h, gate, weight)
        ctx.settings, ctx.first, ctx.joint = (eps, groups, norm_first), first, joint
        with torch.cuda.device_of(h):  # Triton launches on the current device
            return launch.norm(h, gate, weight, eps, groups, norm_first, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        from kernels.gated_norm import launch

        (h, gate, weight), (eps, groups, norm_first) = ctx.saved_tensors, ctx.settings
        with torch.cuda.device_of(h):
            d_gate = ctx.joint.begin(gate, ctx.first)
            gradients = launch.norm_backward(dy, h, gate, weight, eps, groups, norm_first, d_gate)
        return (*gradients, *[None] * 6)
