"""short_conv: the causal depthwise convolution of a few taps in front of a recurrence, with its SiLU."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.joint import JointGradient
from kernels.short_conv import columns, op, reference
from kernels.short_conv.reference import last_inputs

__all__ = ["joint_gradient", "last_inputs", "short_conv", "short_conv_columns"]


def short_conv(
    x_BTD: Tensor, history_BHD: Tensor | None, weight_DW: Tensor, bias_D: Tensor, starts_BT: Tensor | None = None, silu: bool = False
) -> Tensor:
    """y_t = act(bias + sum_w weight[:, w] x_{t-W+1+w}), act the identity or SiLU; y (B, T, D) in x's dtype, sums in fp32 on a GPU.

    history (B, W-1, D): the inputs before the first (zeros if None). starts (B, T) bool: no tap reaches over a document start.
    x may be some columns of a larger tensor. Differentiable in x, history, weight and bias.
    """
    # Traced, documents go through the op too: torch.compile of torch 2.11 loses gradients of the reference's autograd.Function.
    through_op = op.use_triton(x_BTD) or starts_BT is not None and torch.compiler.is_compiling()
    if through_op and weight_DW.shape[1] > 1 and x_BTD.shape[1]:
        return op.convolve(x_BTD, history_BHD, weight_DW, bias_D, starts_BT, silu)
    return reference.short_conv(x_BTD, history_BHD, weight_DW, bias_D, starts_BT, silu)


def _in_one_piece(x_BTC: Tensor) -> bool:
    return op.use_triton(x_BTC) and x_BTC.shape[1] > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def joint_gradient(x_BTC: Tensor) -> JointGradient | None:
    """For `short_conv_columns` and `gated_norm` of one projection x: where its gradient is made without copies. None where there is nothing
    to gain."""
    return JointGradient(x_BTC.shape[-1]) if _in_one_piece(x_BTC) else None


def short_conv_columns(
    x_BTC: Tensor,
    first: int,
    history_BHD: Tensor | None,
    weight_DW: Tensor,
    bias_D: Tensor,
    starts_BT: Tensor | None = None,
    silu: bool = False,
    joint: JointGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns before `first`, `short_conv` of the D columns from there, and the columns after them.

    As splitting x, but on a GPU the gradient of x is made in one piece. Give `joint`, and what comes before or after, to `gated_norm` too,
    and its gradient is not copied either.
    """
    D = weight_DW.shape[0]
    if _in_one_piece(x_BTC) and weight_DW.shape[1] > 1:
        return columns.Columns.apply(x_BTC, history_BHD, weight_DW, bias_D, starts_BT, first, silu, joint)
    before, convolved, after = x_BTC.split([first, D, x_BTC.shape[-1] - first - D], -1)
    return before, short_conv(convolved, history_BHD, weight_DW, bias_D, starts_BT, silu), after
