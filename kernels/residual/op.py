"""The custom ops everywhen::residual and its backward. Saved for backward are x and the scale."""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import direct, no_triton
from kernels.residual import reference


def use_triton(x: Tensor, y: Tensor) -> bool:
    return torch.float64 not in (x.dtype, y.dtype) and x.shape == y.shape and not no_triton(x.device)


def _add(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    if use_triton(x, y) and x.numel():
        from kernels.residual import triton as kernels

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return kernels.add(x, y, scale)
    return reference.residual(x, y, scale).contiguous()


add_op = torch.library.custom_op("everywhen::residual", _add, mutates_args=())


@add_op.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))


def _backward(d: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of y in `dtype`, and of the scale."""
    if use_triton(x, d) and x.numel():
        from kernels.residual import triton as kernels

        with torch.cuda.device_of(x):
            return kernels.add_backward(d, x, scale, dtype)
    dx, d_scale = reference.residual_backward(d, x, scale)
    return dx.to(x.dtype).contiguous(), d.to(dtype), d_scale.to(scale.dtype)


def _copied(d: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `_backward`, and no result is one of the arguments, which a custom op may not return."""
    dx, dy, d_scale = _backward(d, x, scale, dtype)
    return dx, dy.clone() if dy.data_ptr() == d.data_ptr() else dy, d_scale


backward_op = torch.library.custom_op("everywhen::residual_backward", _copied, mutates_args=())
add_backward = direct(backward_op, _backward)


@backward_op.register_fake
def _(d: Tensor, x: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), d.new_empty(d.shape, dtype=dtype), scale.new_empty(scale.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, scale = inputs
    ctx.dtype = y.dtype
    ctx.save_for_backward(x, scale)


def _differentiate(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return add_backward(d, *ctx.saved_tensors, ctx.dtype)


add = direct(add_op, _add, _save, _differentiate)
