"""The joined products as an autograd function. Saved for backward are the input and the weights in the dtype of the products.

Legend: M rows, D width of the input, N width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import planned
from kernels.linear.ahead import recorded
from kernels.linear.spared import is_unread
from kernels.op import runs_kernels


def weight_gradient(d_MN: Tensor, x_MD: Tensor) -> Tensor:
    """d^T x (N, D) in fp32, written so by the product itself where the device can."""
    if d_MN.device.type == "cuda" and type(d_MN) is Tensor:
        return torch.mm(d_MN.T, x_MD, out_dtype=torch.float32)
    if planned():
        return x_MD.new_empty(d_MN.shape[1], x_MD.shape[1], dtype=torch.float32)
    return (d_MN.T @ x_MD).float()


def add_product(total_NK: Tensor | None, d_MN: Tensor, x_MK: Tensor) -> Tensor:
    """total + d^T x, written over total (fp32, or fp64 as the factors): by the product itself where the device can, which then adds before it rounds.
    total: None for nothing yet."""
    if total_NK is None:
        return weight_gradient(d_MN, x_MK) if d_MN.dtype in (torch.bfloat16, torch.float16) else d_MN.T @ x_MK
    if (
        d_MN.device.type == "cuda"
        and d_MN.dtype in (torch.bfloat16, torch.float16)
        and type(d_MN) is Tensor
        and total_NK.dtype == torch.float32
    ):
        return torch.addmm(total_NK, d_MN.T, x_MK, out_dtype=torch.float32, out=total_NK)
    total_NK += d_MN.T @ x_MK
    return total_NK


def runs(gradients: list[Tensor]) -> list[tuple[int, int, Tensor]]:
    """Gradients (M, N each) as (first, past the last, tensor): those that lie side by side in one tensor as one."""
    made: list[tuple[int, int, Tensor]] = []
    for i, d_MN in enumerate(gradients):
        if made:
            first, _, before = made[-1]
            beside = (
                d_MN.stride(1) == before.stride(1) == 1
                and d_MN.stride(0) == before.stride(0)
                and d_MN.storage_offset() == before.storage_offset() + before.shape[1]
                and before.shape[1] + d_MN.shape[1] <= d_MN.stride(0)
                and d_MN.untyped_storage()._cdata == before.untyped_storage()._cdata
            )
            if beside:
                width = before.shape[1] + d_MN.shape[1]
                made[-1] = (first, i + 1, before.as_strided((before.shape[0], width), before.stride()))
                continue
        made.append((i, i + 1, d_MN))
    return made


def cast(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights' rows one below the other, in `dtype`."""
    casts, rows = recorded(), [w.shape[0] for w in weights]
    if casts is not None and all(w.dtype == torch.float32 and w.is_contiguous() for w in weights):
        ahead = casts.take(weights, dtype)
        if ahead is not None:
            return ahead
    joined_ND = torch.empty(sum(rows), weights[0].shape[1], dtype=dtype, device=weights[0].device)
    pieces = joined_ND.split(rows)
    if runs_kernels(joined_ND) and not planned() and all(w.dtype == torch.float32 for w in weights):
        from kernels.linear import triton

        with torch.cuda.device_of(joined_ND):
            triton.cast(weights, pieces)
        return joined_ND
    for piece, weight in zip(pieces, weights):
        piece.copy_(weight)
    return joined_ND


class Joined(torch.autograd.Function):
    """x, dtype, number of weights and of those among them, at the end, whose outputs lie apart, weights, biases (of all or none) -> an output for each
    weight, columns of one tensor but for those apart, which are of another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: int, apart: int, *parameters: Tensor) -> Any:
        weights, biases = parameters[:count], parameters[count:]
        rows = [w.shape[0] for w in weights]
        with torch.autocast(x.device.type, enabled=False):
            joined_ND = cast(weights, dtype)
            x_MD = x.to(dtype).flatten(0, -2)
            made: list[Tensor] = []
            at = 0
            for first, past in [(0, count - apart), (count - apart, count)] if apart else [(0, count)]:
                weight_ND = joined_ND[at : at + sum(rows[first:past])]
                at += weight_ND.shape[0]
                if is_unread():
                    y_MN = x_MD.new_empty(x_MD.shape[0], weight_ND.shape[0])
                elif biases:
                    y_MN = torch.addmm(torch.cat(biases[first:past]).to(dtype), x_MD, weight_ND.T)
                else:
                    y_MN = x_MD @ weight_ND.T
                y = y_MN.view(*x.shape[:-1], -1)
                made += y.split(rows[first:past], -1) if past - first > 1 else [y]
        ctx.save_for_backward(x_MD, joined_ND)
        ctx.rows, ctx.biased, ctx.shape, ctx.of = rows, bool(biases), x.shape, x.dtype
        return made[0] if count == 1 else tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        x_MD, joined_ND = ctx.saved_tensors
        dtype, rows = joined_ND.dtype, ctx.rows
        with torch.autocast(x_MD.device.type, enabled=False):
            given = [x_MD.new_zeros(x_MD.shape[0], n) if d is None else d.to(dtype).reshape(-1, n) for d, n in zip(gradients, rows)]
            d_x: Tensor | None = None
            d_weights: list[Tensor] = []
            at = 0
            for first, past, d_MN in runs(given):
                width = sum(rows[first:past])
                weight_ND = joined_ND[at : at + width]
                if ctx.needs_input_grad[0]:
                    d_x = d_MN @ weight_ND if d_x is None else d_x.addmm_(d_MN, weight_ND)
                d_weights += weight_gradient(d_MN, x_MD).split(rows[first:past])
                at += width
            d_biases = [d.sum(0, dtype=torch.float32) for d in given] if ctx.biased else []
        return None if d_x is None else d_x.view(ctx.shape).to(ctx.of), None, None, None, *d_weights, *d_biases


class OfHeads(torch.autograd.Function):
    """x (M, E, K), weights (E, K, O) in the dtype of the products -> (E, M, O): each head's product by itself. The gradient of x is written as x lies, by
    the product; autograd's own would lie as the output does, and be copied."""

    @staticmethod
    def forward(ctx: Any, x_MEK: Tensor, weight_EKO: Tensor) -> Tensor:
        ctx.save_for_backward(x_MEK, weight_EKO)
        with torch.autocast(x_MEK.device.type, enabled=False):
            return torch.bmm(x_MEK.transpose(0, 1), weight_EKO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_EMO: Tensor) -> tuple[Tensor, Tensor]:
        x_MEK, weight_EKO = ctx.saved_tensors
        d_x = x_MEK.new_empty(x_MEK.shape)
        with torch.autocast(x_MEK.device.type, enabled=False):
            torch.bmm(d_EMO, weight_EKO.mT, out=d_x.transpose(0, 1))
            return d_x, torch.bmm(x_MEK.permute(1, 2, 0), d_EMO)
