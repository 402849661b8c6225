"""The output head and its loss: never more than `chunk` rows of logits are alive, forward or backward.

Legend: N rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import gradient_, losses, reference
from kernels.linear.op import add_product
from models.init import tag


def _logits(h_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(h_ND.to(dtype), weight_VD.to(dtype))


class _ChunkedLoss(torch.autograd.Function):
    """Computes the logits again in the backward pass, and sums the weight's gradient over the chunks in fp32.

    (Autograd over a loop of chunks would add the chunks' gradients in bf16 under autocast.)
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cast_VD = weight_VD.to(dtype)
        pieces = [losses(_logits(h, cast_VD, dtype), labels) for h, labels in zip(h_ND.split(chunk), labels_N.split(chunk))]
        nll_N, log_z_N = (torch.cat(parts) for parts in zip(*pieces))
        ctx.save_for_backward(h_ND, weight_VD, labels_N, log_z_N)
        ctx.chunk, ctx.dtype = chunk, dtype
        return nll_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        h_ND, weight_VD, labels_N, log_z_N = ctx.saved_tensors
        dtype, (g_nll_N, g_log_z_N) = ctx.dtype, gradients
        cast_VD = weight_VD.to(dtype)
        d_h_ND = torch.empty_like(h_ND)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=log_z_N.dtype) if ctx.needs_input_grad[1] else None
        for a in range(0, h_ND.shape[0], ctx.chunk):
            rows = slice(a, a + ctx.chunk)
            d_NV = gradient_(_logits(h_ND[rows], cast_VD, dtype), labels_N[rows], log_z_N[rows], g_nll_N[rows], g_log_z_N[rows])
            d_h_ND[rows] = d_NV @ cast_VD
            if d_weight_VD is not None:
                counted = torch.where((labels_N[rows] == reference.IGNORED)[:, None], 0.0, h_ND[rows])  # zero times NaN is NaN
                d_weight_VD = add_product(d_weight_VD, d_NV, counted.to(dtype))
        return d_h_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype), None, None, None


class Head(nn.Linear):
    """Logits, or the loss of each row. Both are this module's forward, so that ZeRO-3 finds the weight whole."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        tag(self.weight, "vocabulary")

    def forward(self, h: Tensor, labels_N: Tensor | None = None, *, chunk: int = 2048, recompute: bool = True) -> Any:
        """Without labels: logits (..., V) of h (..., D). With labels (N,): (nats, log-partition), both (N,) and 0 where the
        label is -100. Raises ValueError on a CPU for a label that is none of the logits; on a GPU its loss is NaN.

        recompute: hold `chunk` rows of logits at a time and compute them again in the backward pass; False keeps them all.
        """
        if labels_N is None:
            return F.linear(h, self.weight)
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            if recompute or not torch.is_grad_enabled():
                return _ChunkedLoss.apply(h, self.weight, labels_N, chunk, dtype)
            h = torch.where((labels_N == reference.IGNORED)[:, None], 0.0, h)
            return reference.losses(_logits(h, self.weight, dtype), labels_N)
