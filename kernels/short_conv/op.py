"""The custom ops everywhen::short_conv and its backward. Saved for backward are the inputs; the derivative of SiLU is computed again.

Legend: B batch, T time, D channels, W width, H = W-1 inputs of history.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from kernels.dispatch import direct, no_triton, planned
from kernels.short_conv import reference

# ruff: noqa: UP045  (the schema of a custom op is read from these annotations)


def use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and not no_triton(x.device)


def _convolve(x: Tensor, history: Optional[Tensor], weight: Tensor, bias: Tensor, starts: Optional[Tensor], silu: bool) -> Tensor:
    """y (B, T, D) in the dtype of x, T >= 1, W >= 2."""
    if use_triton(x):
        from kernels.short_conv import launch

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return launch.convolve(x, history, weight, bias, starts, silu)
    return reference.short_conv(x, history, weight, bias, starts, silu).clone(memory_format=torch.contiguous_format)


convolve_op = torch.library.custom_op("everywhen::short_conv", _convolve, mutates_args=())


@convolve_op.register_fake
def _(x: Tensor, history: Optional[Tensor], weight: Tensor, bias: Tensor, starts: Optional[Tensor], silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    dy: Tensor, x: Tensor, history: Optional[Tensor], weight: Tensor, bias: Tensor, starts: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, history (empty without one), weight and bias, each in the dtype of its tensor."""
    if use_triton(x):
        from kernels.short_conv import launch

        with torch.cuda.device_of(x):
            dx, d_history, d_weight, d_bias = launch.convolve_backward(dy, x, history, weight, bias, starts, silu)
        return dx, x.new_empty(0) if d_history is None else d_history, d_weight, d_bias
    found = reference.short_conv_backward(dy, x, history, weight, bias, starts, silu)
    dx, d_weight, d_bias = (
        f.to(t.dtype, memory_format=torch.contiguous_format, copy=True) for f, t in zip(found[:1] + found[2:], (x, weight, bias))
    )
    return (
        dx,
        x.new_empty(0) if history is None else found[1].to(history.dtype, memory_format=torch.contiguous_format, copy=True),
        d_weight,
        d_bias,
    )


backward_op = torch.library.custom_op("everywhen::short_conv_backward", _backward, mutates_args=())
convolve_backward = direct(backward_op, _backward)


@backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, history: Optional[Tensor], weight: Tensor, bias: Tensor, starts: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    past = x.new_empty(0) if history is None else history.new_empty(history.shape)
    return x.new_empty(x.shape), past, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, history, weight, bias, starts = ctx.saved_tensors
    dx, d_history, d_weight, d_bias = convolve_backward(dy, x, history, weight, bias, starts, ctx.silu)
    return dx, None if history is None else d_history, d_weight, d_bias, None, None


convolve = direct(convolve_op, _convolve, _save, _differentiate)
undifferentiated = direct(convolve_op, _convolve)


class Columns(torch.autograd.Function):
    """The convolution of some columns of a projection; the columns before and after are passed on.

    All gradients come here together, so the gradient of the projection is one tensor that nobody puts together from parts: where
    `gated_norm` made its gradient of a gate inside a tensor of the projection's size (`whole`), the others are written beside it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, first: int, silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        end = first + weight.shape[0]
        ctx.save_for_backward(x, history, weight, bias, starts)
        ctx.first, ctx.silu = first, silu
        ctx.set_materialize_grads(False)
        return x[..., :first], undifferentiated(x[..., first:end], history, weight, bias, starts, silu), x[..., end:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, before: Tensor | None, dy: Tensor | None, after: Tensor | None) -> tuple[Any, ...]:
        from kernels.short_conv import launch

        x, history, weight, bias, starts = ctx.saved_tensors
        first, end = ctx.first, ctx.first + weight.shape[0]
        wholes = [
            w for w in (getattr(g, "whole", None) for g in (before, after)) if w is not None and w.shape == x.shape and w.dtype == x.dtype
        ]
        whole = wholes[0] if wholes else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for part, gradient in ((whole[..., :first], before), (whole[..., end:], after)):
            if gradient is None:
                part.zero_()
            elif getattr(gradient, "whole", None) is not whole:
                part.copy_(gradient)
        dy = torch.zeros_like(x[..., first:end]) if dy is None else dy
        if planned():  # tensors without storage: shapes only
            d_history = None if history is None else torch.empty_like(history)
            return whole, d_history, torch.empty_like(weight), torch.empty_like(bias), None, None, None
        with torch.cuda.device_of(x):
            _, d_history, d_weight, d_bias = launch.convolve_backward(
                dy, x[..., first:end], history, weight, bias, starts, ctx.silu, whole[..., first:end]
            )
        return whole, d_history, d_weight, d_bias, None, None, None
