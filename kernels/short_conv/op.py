"""The op everywhen::short_conv. Saved for backward are the inputs; the derivative of SiLU is computed again.

Legend: B batch, T time, D channels, W width, H = W-1 inputs of history.
"""

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.op import define
from kernels.short_conv import reference


def use_triton(x: Tensor) -> bool:
    return x.dtype != torch.float64 and not no_triton(x.device)


def _forward(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, silu: bool) -> Tensor:
    """y (B, T, D) in the dtype of x, T >= 1, W >= 2."""
    from kernels.short_conv import launch

    return launch.convolve(x, history, weight, bias, starts, silu)


def _backward(
    dy: Tensor, x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, history, weight and bias, each in the dtype of its tensor."""
    from kernels.short_conv import launch

    return launch.convolve_backward(dy, x, history, weight, bias, starts, silu)


convolve, convolve_op = define(
    "short_conv",
    _forward,
    lambda x, *_: x.new_empty(x.shape),
    _backward,
    reference=reference.short_conv,
    reference_backward=reference.short_conv_backward,
)
