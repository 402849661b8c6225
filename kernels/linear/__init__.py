"""linear, linears: matrix products with fp32 weights in 16 bits, no byte moved twice.

Under autocast torch makes a bf16 copy of each fp32 weight, one product for each, input gradients that are added to each other afterwards, and
weight gradients in bf16 that are then cast. Here the copies of all weights that take one input lie side by side, so that they are one
product; input gradients are summed by the products themselves, and the product of a weight's gradient writes fp32.

Legend: M rows, D width of the input, N width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.dispatch import is_eager, planned
from kernels.linear import float8, reference
from kernels.linear.reference import product_dtype
from kernels.linear.spared import unread

__all__ = ["joins", "linear", "linears", "of_heads", "product_dtype", "unread"]


def joins(x: Tensor, layers: Sequence[nn.Linear]) -> bool:
    """Whether the products are ours: in 16 bits, of fp32 weights, on a GPU, and nobody traces."""
    return (
        (x.is_cuda or planned())
        and (is_eager(x) or planned())
        and torch.is_grad_enabled()
        and product_dtype(x) in (torch.bfloat16, torch.float16)
        and all(layer.weight.dtype == torch.float32 for layer in layers)
    )


def linears(x: Tensor, *layers: nn.Linear, apart: int = 0) -> tuple[Tensor, ...]:
    """What each of `layers` makes of x (..., D): as many tensors (..., N). They may be columns of one tensor, but not of one with the last `apart` of
    them, and gradients that come back as neighbouring columns of one tensor are taken as one. Differentiable once."""
    if not joins(x, layers):
        return reference.linears(x, *layers)
    from kernels.linear import op

    if apart and float8.suits(x, layers):
        return *linears(x, *layers[:-apart]), *linears(x, *layers[-apart:])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weights = [layer.weight for layer in layers]
    if float8.suits(x, layers):
        made = float8.Joined8.apply(x, product_dtype(x), len(layers), *weights, *biases)
    else:
        made = op.Joined.apply(x, product_dtype(x), len(layers), apart, *weights, *biases)
    return made if isinstance(made, tuple) else (made,)


def of_heads(x_MEK: Tensor, weight_EKO: Tensor) -> Tensor:
    """(E, M, O): what each head's matrix makes of its channels. weight: fp32 or in x's dtype."""
    ours = (x_MEK.is_cuda or planned()) and (is_eager(x_MEK) or planned()) and torch.is_grad_enabled()
    if not ours or x_MEK.dtype not in (torch.bfloat16, torch.float16):
        return reference.of_heads(x_MEK, weight_EKO)
    from kernels.linear.op import OfHeads

    made: Tensor = OfHeads.apply(x_MEK, weight_EKO.to(x_MEK.dtype))
    return made


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """What `layer` makes of x (..., D): (..., N)."""
    return linears(x, layer)[0]
