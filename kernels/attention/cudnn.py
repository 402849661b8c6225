"""cuDNN's attention kernels, called by torch's own operations for them, and whether they can be.

Legend: B batch, T time, H query heads, G key/value heads, K head width, N tokens of packed rows, S documents.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HOPPER = (9, 0)  # the first kind of GPU on which these kernels are ahead of FlashAttention-2
DTYPES = (torch.bfloat16, torch.float16)


def takes(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, packed: bool) -> bool:
    """Whether cuDNN is there and takes heads of this dtype, width and grouping; tried once for each."""
    if not q_BHTK.is_cuda or q_BHTK.dtype not in DTYPES or not q_BHTK.dtype == k_BGTK.dtype == v_BGTK.dtype or torch.version.hip:
        return False
    return _works(q_BHTK.device, q_BHTK.dtype, q_BHTK.shape[3], q_BHTK.shape[1] // k_BGTK.shape[1], packed)


@cache
def _works(device: torch.device, dtype: torch.dtype, K: int, group: int, packed: bool) -> bool:
    if torch.cuda.get_device_capability(device) < HOPPER or K % 8 or K > 128 or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    if torch.cuda.is_current_stream_capturing():
        return False  # what is tried for the first time inside a graph would be part of it
    try:
        with torch.enable_grad(), torch.cuda.device(device), torch.autocast("cuda", enabled=False):
            q, k, v = (torch.ones(1, 128, h, K, dtype=dtype, device=device, requires_grad=True) for h in (group, 1, 1))
            if packed:
                bounds = torch.tensor([0, 50, 128, 128], dtype=torch.int32, device=device)
                y = Packed.apply(*(t.flatten(0, 1) for t in (q, k, v)), bounds, 128)
            else:
                y = causal(*(t.transpose(1, 2) for t in (q, k, v)))
            grads = torch.autograd.grad(y.sum(), (q, k, v))
            ones = y.isfinite().all() & ((y - 1).abs().max() < 0.02) & torch.stack([g.isfinite().all() for g in grads]).all()
            return bool(ones)
    except RuntimeError:
        return False


def causal(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """Causal attention (B, H, T, K), differentiable."""
    logsumexp = torch.is_grad_enabled() and (q_BHTK.requires_grad or k_BGTK.requires_grad or v_BGTK.requires_grad)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q_BHTK, k_BGTK, v_BGTK, None, logsumexp, 0.0, True, False)[0]


class Packed(torch.autograd.Function):
    """Causal attention within documents: q (N, H, K), k and v (N, G, K), int32 bounds (S + 1,), the longest document -> (N, H, K)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        made = torch.ops.aten._cudnn_attention_forward(q, k, v, None, bounds, bounds, longest, longest, True, 0.0, True, False)
        y, logsumexp, seed, offset = made[0], made[1], made[6], made[7]
        ctx.save_for_backward(q, k, v, y, logsumexp, seed, offset, bounds)
        ctx.longest = longest
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        q, k, v, y, logsumexp, seed, offset, bounds = ctx.saved_tensors
        made = torch.ops.aten._cudnn_attention_backward(
            d.contiguous(), q, k, v, y, logsumexp, seed, offset, None, bounds, bounds, ctx.longest, ctx.longest, 0.0, True
        )
        return *made[:3], None, None
