"""The convolution of some columns of a projection, where kernels run and gradients are wanted: the projection's gradient is made in one piece.

Legend: B batch, T time, C columns of the projection, D channels, H inputs of history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import is_eager, planned
from kernels.joint import JointGradient
from kernels.short_conv import op


class Columns(torch.autograd.Function):
    """The columns before, the convolution and the columns after; the columns before and after are passed on.

    All gradients come here together, so the gradient of the projection is one tensor that nobody puts together from parts: where `gated_norm`
    began it (`joint`), the others are written beside its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        history: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        starts: Tensor | None,
        first: int,
        silu: bool,
        joint: JointGradient | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        end = first + weight.shape[0]
        ctx.save_for_backward(x, history, weight, bias, starts)
        ctx.first, ctx.silu, ctx.joint = first, silu, joint
        ctx.set_materialize_grads(False)
        to_convolve = x[..., first:end]
        convolve = op.convolve if is_eager(x) else op.convolve_op
        return x[..., :first], convolve(to_convolve, history, weight, bias, starts, silu), x[..., end:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, before: Tensor | None, dy: Tensor | None, after: Tensor | None) -> tuple[Any, ...]:
        from kernels.short_conv import launch

        x, history, weight, bias, starts = ctx.saved_tensors
        first, end, C = ctx.first, ctx.first + weight.shape[0], x.shape[-1]
        joint = JointGradient(C) if ctx.joint is None else ctx.joint
        whole = joint.finish(x, ((0, first, before), (end, C, after)))
        dy = torch.zeros_like(x[..., first:end]) if dy is None else dy
        if planned():  # tensors without storage: shapes only
            d_history = None if history is None else torch.empty_like(history)
            return whole, d_history, torch.empty_like(weight), torch.empty_like(bias), None, None, None, None
        with torch.cuda.device_of(x):
            _, d_history, d_weight, d_bias = launch.convolve_backward(
                dy, x[..., first:end], history, weight, bias, starts, ctx.silu, whole[..., first:end]
            )
        return whole, d_history, d_weight, d_bias, None, None, None, None
