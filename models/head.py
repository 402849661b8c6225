"""The output head and its loss: never more than `chunk` rows of logits are alive, forward or backward.

Legend: N rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _logits(h_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Product in `dtype`, result in fp32 (fp64 for fp64)."""
    return F.linear(h_ND.to(dtype), weight_VD.to(dtype)).to(torch.promote_types(dtype, torch.float32))


def _losses(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, 0 where the label is -100; log-partition) of each row."""
    log_z_N = torch.logsumexp(logits_NV, -1)
    picked_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    return (log_z_N - picked_N) * (labels_N != -100), log_z_N


class _ChunkedLoss(torch.autograd.Function):
    """Computes the logits again in the backward pass, and sums the weight's gradient over the chunks in fp32.

    (Autograd over a loop of chunks would add the chunks' gradients in bf16 under autocast.)
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cast_VD = weight_VD.to(dtype)
        pieces = [_losses(_logits(h, cast_VD, dtype), labels) for h, labels in zip(h_ND.split(chunk), labels_N.split(chunk))]
        nll_N, log_z_N = (torch.cat(parts) for parts in zip(*pieces))
        ctx.save_for_backward(h_ND, weight_VD, labels_N, log_z_N)
        ctx.chunk, ctx.dtype = chunk, dtype
        return nll_N, log_z_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        h_ND, weight_VD, labels_N, log_z_N = ctx.saved_tensors
        dtype, g_log_z_N = ctx.dtype, gradients[1]
        g_nll_N = gradients[0] * (labels_N != -100)
        cast_VD = weight_VD.to(dtype)
        d_h_ND = torch.empty_like(h_ND)
        d_weight_VD = torch.zeros_like(weight_VD, dtype=log_z_N.dtype) if ctx.needs_input_grad[1] else None
        for a in range(0, h_ND.shape[0], ctx.chunk):
            rows = slice(a, a + ctx.chunk)
            # d logits = softmax * (g_nll + g_log_z) - onehot * g_nll
            d_NV = _logits(h_ND[rows], cast_VD, dtype).sub_(log_z_N[rows, None]).exp_().mul_((g_nll_N + g_log_z_N)[rows, None])
            d_NV.scatter_add_(1, labels_N[rows].clamp(min=0)[:, None], -g_nll_N[rows, None])
            d_NV = d_NV.to(dtype)
            d_h_ND[rows] = d_NV @ cast_VD
            if d_weight_VD is not None:
                d_weight_VD += d_NV.T @ h_ND[rows].to(dtype)
        return d_h_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype), None, None, None


class Head(nn.Linear):
    """Logits, or the loss of each row. Both are this module's forward, so that ZeRO-3 finds the weight whole."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)

    def forward(self, h: Tensor, labels_N: Tensor | None = None, *, chunk: int = 2048, recompute: bool = True) -> Any:
        """Without labels: logits (..., V) of h (..., D). With labels (N,): (nats, 0 where the label is -100; log-partition), both (N,).

        recompute: hold `chunk` rows of logits at a time and compute them again in the backward pass; False keeps them all.
        """
        if labels_N is None:
            return F.linear(h, self.weight)
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            if recompute or not torch.is_grad_enabled():
                return _ChunkedLoss.apply(h, self.weight, labels_N, chunk, dtype)
            return _losses(_logits(h, self.weight, dtype), labels_N)
