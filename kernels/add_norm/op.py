"""The custom ops everywhen::add_norm and its backward. Saved for backward are the new stream, and with a scale the old one."""

from typing import Any, Optional

import torch
from torch import Tensor

from kernels.add_norm import reference
from kernels.dispatch import direct, no_triton

# ruff: noqa: UP045  (the schema of a custom op is read from these annotations)
WIDEST = 16384  # columns that the registers of a program hold


def use_triton(x: Tensor, y: Tensor) -> bool:
    return torch.float64 not in (x.dtype, y.dtype) and x.shape == y.shape and x.shape[-1] <= WIDEST and not no_triton(x.device)


def _add_norm(x: Tensor, y: Tensor, scale: Optional[Tensor], weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if use_triton(x, y) and x.numel():
        from kernels.add_norm import triton as kernels

        with torch.cuda.device_of(x):  # Triton launches on the current device
            return kernels.add_norm(x, y, scale, weight, eps, dtype)
    r, n = reference.add_norm(x, y, scale, weight, eps, dtype)
    return r.contiguous(), n.contiguous() if n.data_ptr() != r.data_ptr() else n.clone()


add_norm_op = torch.library.custom_op("everywhen::add_norm", _add_norm, mutates_args=())


@add_norm_op.register_fake
def _(x: Tensor, y: Tensor, scale: Optional[Tensor], weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)), x.new_empty(x.shape, dtype=dtype)


def _backward(
    d_r: Tensor, d_n: Tensor, r: Tensor, x: Optional[Tensor], scale: Optional[Tensor], weight: Tensor, eps: float,
    x_dtype: torch.dtype, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, y, scale (empty without one) and weight, each in the dtype of its tensor."""
    if use_triton(r, r) and r.numel():
        from kernels.add_norm import triton as kernels

        with torch.cuda.device_of(r):
            dx, dy, d_scale, d_weight = kernels.add_norm_backward(d_r, d_n, r, x, scale, weight, eps, (x_dtype, y_dtype))
        return dx, dy, r.new_empty(0) if d_scale is None else d_scale, d_weight
    dx, dy, d_scale, d_weight = reference.add_norm_backward(d_r, d_n, r, x, scale, weight, eps)
    return (
        dx.to(x_dtype).contiguous(),
        dy.to(y_dtype).contiguous(),
        d_scale.to((weight if scale is None else scale).dtype),
        d_weight.to(weight.dtype),
    )


def _copied(*inputs: Any) -> tuple[Tensor, ...]:
    """As `_backward`, and no result shares memory with another, which a custom op's may not."""
    dx, dy, d_scale, d_weight = _backward(*inputs)
    return dx, dy.clone() if dy.data_ptr() == dx.data_ptr() else dy, d_scale, d_weight


def _fake(
    d_r: Tensor, d_n: Tensor, r: Tensor, x: Optional[Tensor], scale: Optional[Tensor], weight: Tensor, eps: float,
    x_dtype: torch.dtype, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_scale = r.new_empty(0) if scale is None else scale.new_empty(scale.shape)
    return r.new_empty(r.shape, dtype=x_dtype), r.new_empty(r.shape, dtype=y_dtype), d_scale, weight.new_empty(weight.shape)


def _copied_op(
    d_r: Tensor, d_n: Tensor, r: Tensor, x: Optional[Tensor], scale: Optional[Tensor], weight: Tensor, eps: float,
    x_dtype: torch.dtype, y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dy, d_scale, d_weight = _copied(d_r, d_n, r, x, scale, weight, eps, x_dtype, y_dtype)
    return dx, dy, d_scale, d_weight


backward_op = torch.library.custom_op("everywhen::add_norm_backward", _copied_op, mutates_args=())
backward_op.register_fake(_fake)
add_norm_backward = direct(backward_op, _backward)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, y, scale, weight, ctx.eps, _ = inputs
    ctx.dtypes = (x.dtype, y.dtype)
    ctx.save_for_backward(output[0], None if scale is None else x, scale, weight)


def _differentiate(ctx: Any, d_r: Tensor, d_n: Tensor) -> tuple[Any, ...]:
    r, x, scale, weight = ctx.saved_tensors
    dx, dy, d_scale, d_weight = add_norm_backward(d_r, d_n, r, x, scale, weight, ctx.eps, *ctx.dtypes)
    return dx, dy, None if scale is None else d_scale, d_weight, None, None


add_norm = direct(add_norm_op, _add_norm, _save, _differentiate)
