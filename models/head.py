"""The output head and its loss: never more than `chunk` rows of logits are alive, forward or backward.

Legend: N rows (tokens), D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels.cross_entropy import gradient_, losses, losses_and_gradient_, reference
from kernels.dispatch import is_eager, planned
from kernels.linear.op import add_product, cast
from models.init import tag


def _logits(h_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(h_ND.to(dtype), weight_VD.to(dtype))


def _add_gradients(
    d_NV: Tensor, h_ND: Tensor, cast_VD: Tensor, ignored_N1: Tensor, d_h_ND: Tensor | None, d_weight_VD: Tensor | None, of_weight: bool
) -> Tensor | None:
    """Of some rows' logits: the gradient of the rows is written into d_h; returns d_weight (None: nothing yet) with that of the weight added."""
    if d_h_ND is not None and d_h_ND.dtype == d_NV.dtype:
        torch.mm(d_NV, cast_VD, out=d_h_ND)
    elif d_h_ND is not None:
        d_h_ND.copy_(d_NV @ cast_VD)
    if not of_weight:
        return None
    counted = torch.where(ignored_N1, 0.0, h_ND)  # zero times NaN is NaN
    return add_product(d_weight_VD, d_NV, counted.to(cast_VD.dtype))


class _ChunkedLoss(torch.autograd.Function):
    """Holds the logits of some rows at a time, and sums the weight's gradient over the chunks in fp32.

    (Autograd over a loop of chunks would add the chunks' gradients in bf16 under autocast.) summed: gradients are made together with the losses, as
    those of their sum, which a backward pass from a sum only scales; from anything else it computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk: int, dtype: torch.dtype, summed: bool
    ) -> tuple[Tensor, Tensor]:
        of_h, of_weight = (summed and needed for needed in ctx.needs_input_grad[:2])
        cast_VD = cast([weight_VD], dtype) if is_eager(weight_VD) and weight_VD.dtype != dtype else weight_VD.to(dtype)
        ignored_N1, pieces = (labels_N == reference.IGNORED)[:, None], []
        d_h_ND, d_weight_VD = torch.empty_like(h_ND) if of_h else None, None
        for a in range(0, max(1, h_ND.shape[0]), chunk):
            rows = slice(a, a + chunk)
            logits_NV = _logits(h_ND[rows], cast_VD, dtype)
            if not of_h and not of_weight:
                pieces.append(losses(logits_NV, labels_N[rows]))
                continue
            nll_N, log_z_N, d_NV = losses_and_gradient_(logits_NV, labels_N[rows])
            pieces.append((nll_N, log_z_N))
            d_h = None if d_h_ND is None else d_h_ND[rows]
            d_weight_VD = _add_gradients(d_NV, h_ND[rows], cast_VD, ignored_N1[rows], d_h, d_weight_VD, of_weight)
        nll_N, log_z_N = (torch.cat(parts) for parts in zip(*pieces))
        ctx.save_for_backward(h_ND, weight_VD, labels_N, log_z_N, d_h_ND, d_weight_VD)
        ctx.chunk, ctx.dtype, ctx.summed = chunk, dtype, summed
        ctx.set_materialize_grads(False)
        return nll_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        h_ND, weight_VD, labels_N, log_z_N, d_h_ND, d_weight_VD = ctx.saved_tensors
        g_nll_N, g_log_z_N = gradients
        if ctx.summed and g_log_z_N is None and g_nll_N is not None and g_nll_N.stride() == (0,):  # one number, expanded: that of a sum
            g = g_nll_N[0] if g_nll_N.numel() else 1.0
            d_h_ND = None if d_h_ND is None else d_h_ND * g
            d_weight_VD = None if d_weight_VD is None else (d_weight_VD * g).to(weight_VD.dtype)
            return d_h_ND, d_weight_VD, None, None, None, None
        g_nll_N, g_log_z_N = (torch.zeros_like(log_z_N) if g is None else g for g in gradients)
        of_h, of_weight = ctx.needs_input_grad[:2]
        cast_VD, ignored_N1 = weight_VD.to(ctx.dtype), (labels_N == reference.IGNORED)[:, None]
        d_h_ND, d_weight_VD = torch.empty_like(h_ND) if of_h else None, None
        for a in range(0, max(1, h_ND.shape[0]), ctx.chunk):
            rows = slice(a, a + ctx.chunk)
            d_NV = gradient_(_logits(h_ND[rows], cast_VD, ctx.dtype), labels_N[rows], log_z_N[rows], g_nll_N[rows], g_log_z_N[rows])
            d_h = None if d_h_ND is None else d_h_ND[rows]
            d_weight_VD = _add_gradients(d_NV, h_ND[rows], cast_VD, ignored_N1[rows], d_h, d_weight_VD, of_weight)
        return d_h_ND, None if d_weight_VD is None else d_weight_VD.to(weight_VD.dtype), None, None, None, None


class Head(nn.Linear):
    """Logits, or the loss of each row. Both are this module's forward, so that ZeRO-3 finds the weight whole."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        tag(self.weight, "vocabulary")

    def forward(self, h: Tensor, labels_N: Tensor | None = None, *, chunk: int = 2048, recompute: bool = True, summed: bool = False) -> Any:
        """Without labels: logits (..., V) of h (..., D). With labels (N,): (nats, log-partition), both (N,) and 0 where the
        label is -100. Raises ValueError on a CPU for a label that is none of the logits; on a GPU its loss is NaN.

        recompute: hold `chunk` rows of logits at a time; False keeps them all. summed: the caller has gradients of the summed nats alone, which are
        made together with them; otherwise the backward pass computes the logits again.
        """
        if labels_N is None:
            return F.linear(h, self.weight)
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        with torch.autocast(device, enabled=False):
            if recompute or not torch.is_grad_enabled():
                ahead = summed and torch.is_grad_enabled() and (is_eager(h) or planned())
                return _ChunkedLoss.apply(h, self.weight, labels_N, chunk, dtype, ahead)
            h = torch.where((labels_N == reference.IGNORED)[:, None], 0.0, h)
            return reference.losses(_logits(h, self.weight, dtype), labels_N)
