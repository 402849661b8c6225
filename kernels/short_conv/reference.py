"""The short convolution in plain torch, in float64 if its input is: the oracle, and what runs where the kernels cannot.

Legend: B batch, T time, D channels, W width, H = W-1 inputs of history.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SegmentedConv(torch.autograd.Function):
    """The convolution where documents are packed: keeps its input only and masks again in the backward pass; sums in fp32.

    padded (B, H+T, D), weight (D, W), bias (D,), document (B, H+T): which document each input belongs to.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight_DW: Tensor, bias_D: Tensor, document: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight_DW, document)
        return _segmented(padded, weight_DW, bias_D, document).to(padded.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded, weight_DW, document = ctx.saved_tensors
        d_padded, d_weight, d_bias = _segmented_backward(gradients[0].to(weight_DW.dtype), padded, weight_DW, document)
        return d_padded.to(padded.dtype), d_weight, d_bias, None


def _segmented(padded: Tensor, weight_DW: Tensor, bias_D: Tensor, document: Tensor) -> Tensor:
    history = weight_DW.shape[1] - 1
    T = padded.shape[1] - history
    y = padded[:, history:] * weight_DW[:, history] + bias_D
    for w in range(history):
        same = document[:, w : w + T] == document[:, history:]
        # Selected by torch.where: multiplying by zero would let a NaN through.
        y += torch.where(same[..., None], padded[:, w : w + T], 0.0) * weight_DW[:, w]
    return y


def _segmented_backward(dy: Tensor, padded: Tensor, weight_DW: Tensor, document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    history, T = weight_DW.shape[1] - 1, dy.shape[1]
    d_padded, d_weight = torch.zeros_like(padded, dtype=dy.dtype), torch.empty_like(weight_DW)
    for w in range(history + 1):
        same = (document[:, w : w + T] == document[:, history:])[..., None]
        d_padded[:, w : w + T] += torch.where(same, dy, 0.0) * weight_DW[:, w]
        d_weight[:, w] = torch.where(same, dy * padded[:, w : w + T], 0.0).sum((0, 1))
    return d_padded, d_weight, dy.sum((0, 1))


def _documents(starts_BT: Tensor | None, padded: Tensor, history: int) -> Tensor:
    """(B, H+T): which document each input belongs to; carried inputs belong to document 0."""
    if starts_BT is None:
        return torch.zeros(padded.shape[:2], dtype=torch.int32, device=padded.device)
    return F.pad(starts_BT.int().cumsum(1), (history, 0))


def with_history(x_BTD: Tensor, history_BHD: Tensor | None, width: int) -> Tensor:
    """(B, H+T, D): the inputs behind those before them (zeros if None)."""
    B, _, D = x_BTD.shape
    past = x_BTD.new_zeros(B, width - 1, D) if history_BHD is None else history_BHD.to(x_BTD.dtype)
    return torch.cat([past, x_BTD], 1)


def _nothing(x_BTD: Tensor, *others: Tensor | None) -> Tensor:
    """The result for T = 0: empty, but part of the graph, so that all inputs get gradients of zero."""
    return x_BTD + sum(t.to(x_BTD.dtype).sum() * 0 for t in others if t is not None)


def short_conv(
    x_BTD: Tensor, history_BHD: Tensor | None, weight_DW: Tensor, bias_D: Tensor, starts_BT: Tensor | None = None, silu: bool = False
) -> Tensor:
    """y (B, T, D) in x's dtype; arguments as of `kernels.short_conv.short_conv`."""
    T, (D, W) = x_BTD.shape[1], weight_DW.shape
    if not T:
        return _nothing(x_BTD, history_BHD, weight_DW, bias_D)
    padded = with_history(x_BTD, history_BHD, W)
    inner = torch.promote_types(x_BTD.dtype, torch.float32)
    if starts_BT is None and T == 1 and not torch.is_grad_enabled():  # decoding: a product is cheaper than a convolution's setting up
        y = (padded.to(inner) * weight_DW.to(inner).T).sum(1, keepdim=True) + bias_D.to(inner)
        y = y.to(x_BTD.dtype)
    elif starts_BT is None:
        weight, bias = weight_DW.to(x_BTD.dtype), bias_D.to(x_BTD.dtype)
        y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=D).transpose(1, 2)
    else:
        with torch.autocast(x_BTD.device.type, enabled=False):
            y = _SegmentedConv.apply(padded, weight_DW.to(inner), bias_D.to(inner), _documents(starts_BT, padded, W - 1))
    return F.silu(y) if silu else y


def short_conv_backward(
    dy_BTD: Tensor, x_BTD: Tensor, history_BHD: Tensor | None, weight_DW: Tensor, bias_D: Tensor, starts_BT: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, history, weight and bias in fp32 (fp64), written out: what the operation does without kernels."""
    inner, history = torch.promote_types(x_BTD.dtype, torch.float32), weight_DW.shape[1] - 1
    padded, weight, dy = with_history(x_BTD, history_BHD, history + 1).to(inner), weight_DW.to(inner), dy_BTD.to(inner)
    document = _documents(starts_BT, padded, history)
    if silu:
        z = _segmented(padded, weight, bias_D.to(inner), document)
        s = torch.sigmoid(z)
        dy = dy * s * (1 + z * (1 - s))
    d_padded, d_weight, d_bias = _segmented_backward(dy, padded, weight, document)
    return d_padded[:, history:], d_padded[:, :history], d_weight, d_bias


def joint_gradient(x_BTC: Tensor) -> None:
    """Nothing: plain torch puts the gradient of a projection together from those of its columns."""
    return None


def short_conv_columns(
    x_BTC: Tensor,
    first: int,
    history_BHD: Tensor | None,
    weight_DW: Tensor,
    bias_D: Tensor,
    starts_BT: Tensor | None = None,
    silu: bool = False,
    joint: object = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns before `first`, `short_conv` of the D columns from there, and the columns after them."""
    D = weight_DW.shape[0]
    before, convolved, after = x_BTC.split([first, D, x_BTC.shape[-1] - first - D], -1)
    return before, short_conv(convolved, history_BHD, weight_DW, bias_D, starts_BT, silu), after


def last_inputs(x_BTD: Tensor, history_BHD: Tensor | None, width: int, starts_BT: Tensor | None) -> Tensor:
    """(B, H, D): the history of the next call, zero where it belongs to an earlier document than the last token."""
    T, H = x_BTD.shape[1], width - 1
    last = (
        x_BTD[:, T - H :].clone() if T >= H else with_history(x_BTD, history_BHD, width)[:, T:]
    )  # not a view, which keeps all inputs alive
    if starts_BT is None:
        return last
    # Document starts among the inputs that are kept; carried inputs start none.
    tail = F.pad(starts_BT[:, max(0, T - H) :].int(), (max(0, H - T), 0))
    after = tail.flip(1).cumsum(1).flip(1) - tail  # starts behind each of them
    return torch.where((after == 0)[..., None], last, 0.0)
