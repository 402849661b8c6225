"""The op everywhen::add_norm. Saved for backward are the new stream, and with a scale the old one."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.add_norm import reference
from kernels.dispatch import is_eager, no_triton
from kernels.gated_norm import gated_norm
from kernels.op import define

WIDEST = 16384  # columns that the registers of a program hold


def use_triton(x: Tensor, y: Tensor) -> bool:
    return torch.float64 not in (x.dtype, y.dtype) and x.shape == y.shape and x.shape[-1] <= WIDEST and not no_triton(x.device)


def _forward(x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from kernels.add_norm import triton

    return triton.add_norm(x, y, scale, weight, eps, dtype)


def _fake(x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype)), x.new_empty(x.shape, dtype=dtype)


def _backward(
    d_r: Tensor | None,
    d_n: Tensor | None,
    r: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, y, scale and weight."""
    from kernels.add_norm import triton

    d_n = _there(d_n, r)
    return triton.add_norm_backward(d_r, d_n, r, x, scale, weight, eps, (x_dtype, y_dtype))


def _there(gradient: Tensor | None, r: Tensor) -> Tensor:
    """Zeros in the place of the gradient of a result that nobody reads: of the norm, as of the last stream none is wanted."""
    return torch.zeros_like(r) if gradient is None else gradient


def _reference_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    d_r, d_n, r, x, scale, weight, eps, x_dtype, y_dtype = arguments
    dx, dy, d_scale, d_weight = reference.add_norm_backward(_there(d_r, r), _there(d_n, r), r, x, scale, weight, eps)
    return dx.to(x_dtype), dy.to(y_dtype), d_scale if scale is not None else None, d_weight


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    _, _, r, _, scale, weight, _, x_dtype, y_dtype = arguments
    d_scale = None if scale is None else scale.new_empty(scale.shape)
    return r.new_empty(r.shape, dtype=x_dtype), r.new_empty(r.shape, dtype=y_dtype), d_scale, weight.new_empty(weight.shape)


add_norm, add_norm_op = define(
    "add_norm",
    _forward,
    _fake,
    _backward,
    reference=reference.add_norm,
    reference_backward=_reference_backward,
    fake_backward=_fake_backward,
    materialize=False,
    save=lambda inputs, output: (
        (output[0], None if inputs[2] is None else inputs[0], inputs[2], inputs[3]),
        (inputs[4], inputs[0].dtype, inputs[1].dtype),
    ),
)


class NormBeside(torch.autograd.Function):
    """x, weight, eps, dtype -> (x, its norm): the gradient of both is made in one pass, as behind an addition."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        from kernels.gated_norm import launch

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            return x, launch.norm(x, None, weight, eps, 1, False, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, d_n: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        with torch.cuda.device_of(x):
            d, _, _, d_weight = _backward(d_x, d_n, x, None, None, weight, ctx.eps, x.dtype, x.dtype)
        return d, d_weight, None, None


def norm_beside(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and its norm. An op cannot return its argument: where this is traced the norm is an op alone, as where there is nothing to differentiate."""
    if is_eager(x) and x.numel() and x.requires_grad and torch.is_grad_enabled():
        made: tuple[Tensor, Tensor] = NormBeside.apply(x, weight, eps, dtype)
        return made
    return x, gated_norm(x, None, weight, eps, dtype=dtype)
