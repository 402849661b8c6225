"""The joined products in 8-bit floats, as an autograd function: inputs and weights in e4m3, gradients in e5m2, each under one scale for the
tensor, found from the tensor itself. Sums are the tensor cores' own; outputs and input gradients come in the dtype of the products, weight
gradients in fp32. Saved for backward are the input and the weights in 8 bits, transposed.

Legend: M rows, D width of the input, N width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.dispatch import planned
from kernels.float8 import E4M3, E5M2, Quantised, product, quantised
from kernels.linear.spared import is_unread

wanted = False  # whether large products are taken in 8 bits (train.fp8)
step = 0  # the optimizer step of which weights are kept in 8 bits; 0: they are cast at every use
SMALLEST = 512  # width and outputs from which a product gains more than the casts cost
WHOLE = 16  # sizes are multiples of it
FAST_OUTPUTS, FAST_GRADIENTS = True, False  # sums with fewer digits, see `kernels.float8.product`


def suits(x: Tensor, layers: Sequence[nn.Linear]) -> bool:
    """Whether these products are taken in 8 bits."""
    D, N = layers[0].in_features, sum(layer.out_features for layer in layers)
    return wanted and min(D, N) >= SMALLEST and not any(size % WHOLE for size in (D, N, x.numel() // D)) and x.numel() > 0


def why_not(device: torch.device) -> str:
    """Empty if the device multiplies in 8 bits, else one sentence."""
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9):
        return ""
    return "Products in 8 bits (train.fp8) need a GPU that has them, such as an H100, an L40S or a B200; set train.fp8=false."


def begin_step(number: int) -> None:
    """From now on weights are those of this step, counted from 1: each is cast once and kept in 8 bits until the next."""
    global step
    step = number


def of_weights(weights: Sequence[Tensor]) -> Quantised:
    """Weights (N each, D) below each other. Kept copies are written over, never made anew, as a CUDA graph holds them."""
    kept = getattr(weights[0], "_float8", None) if step else None
    if kept is not None and kept[0] == step:
        return kept[1]  # type: ignore[no-any-return]
    made = quantised([w.detach() for w in weights], E4M3, out=None if kept is None else kept[1])
    if step:
        weights[0]._float8 = (step, made)  # type: ignore[attr-defined]
    return made


def of_input(x: Tensor) -> Quantised:
    """x (..., D) as a matrix; the same for all products of one input."""
    kept = getattr(x, "_float8", None)
    if kept is not None and kept[0] == x._version:
        return kept[1]  # type: ignore[no-any-return]
    made = quantised([x.detach().flatten(0, -2)], E4M3)
    x._float8 = (x._version, made)  # type: ignore[attr-defined]
    return made


class Joined8(torch.autograd.Function):
    """x, dtype of the outputs, number of weights, weights, biases (of all or none) -> an output for each weight, columns of one tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: int, *parameters: Tensor) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        rows = [w.shape[0] for w in weights]
        with torch.autocast(x.device.type, enabled=False):
            weight, given = of_weights(weights), of_input(x)
            if is_unread():
                y_MN = x.new_empty(given.rows.shape[0], sum(rows), dtype=dtype)
            else:
                bias_N = torch.cat(biases).to(dtype) if biases else None
                y_MN = product(given.rows, weight.rows, given.step, weight.step, dtype, FAST_OUTPUTS, bias_N)
        ctx.save_for_backward(given.columns, given.step, weight.columns, weight.step)
        ctx.kept = weight.rows if planned() else None  # as `of_weights` keeps them, see there
        ctx.rows, ctx.biased, ctx.shape, ctx.of, ctx.dtype = rows, bool(biases), x.shape, x.dtype, dtype
        y = y_MN.view(*x.shape[:-1], -1)
        return y if count == 1 else y.split(rows, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x_DM, x_step, weight_DN, weight_step = ctx.saved_tensors
        rows, M = ctx.rows, x_DM.shape[1]
        with torch.autocast(x_DM.device.type, enabled=False):
            given = [
                torch.zeros(M, n, dtype=ctx.dtype, device=x_DM.device) if d is None else d.reshape(-1, n) for d, n in zip(gradients, rows)
            ]
            d = quantised(given, E5M2, beside=True)
            d_x = None
            if ctx.needs_input_grad[0]:
                d_x = product(d.rows, weight_DN, d.step, weight_step, ctx.dtype, FAST_GRADIENTS).view(ctx.shape).to(ctx.of)
            d_weights = product(d.columns, x_DM, d.step, x_step, torch.float32, FAST_GRADIENTS).split(rows)
            d_biases = [g.sum(0, dtype=torch.float32) for g in given] if ctx.biased else []
        return d_x, None, None, *d_weights, *d_biases
