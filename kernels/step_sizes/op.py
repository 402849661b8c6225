"""The op everywhen::step_sizes. Saved for backward are dt and the bias."""

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.op import define
from kernels.step_sizes import reference


def use_triton(dt: Tensor) -> bool:
    return dt.dtype != torch.float64 and dt.ndim == 3 and not no_triton(dt.device)


def _forward(dt: Tensor, bias: Tensor, low: float, high: float) -> Tensor:
    from kernels.step_sizes import triton

    return triton.step_sizes(dt, bias, low, high)


def _backward(d: Tensor, dt: Tensor, bias: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Gradients of dt and bias."""
    from kernels.step_sizes import triton

    return triton.step_sizes_backward(d, dt, bias, low, high)


make, make_op = define(
    "step_sizes",
    _forward,
    lambda dt, bias, low, high: dt.new_empty(dt.shape, dtype=torch.promote_types(dt.dtype, torch.float32)),
    _backward,
    reference=reference.step_sizes,
    reference_backward=reference.step_sizes_backward,
)
