"""cuDNN's attention within documents, which torch has an operation for but does not choose by itself.

Legend: N tokens of packed rows, H query heads, G key/value heads, K head width, S documents.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HOPPER = (9, 0)  # the first kind of GPU on which these kernels are ahead of FlashAttention-2
WIDEST = 128


def takes(q_NHK: Tensor, k_NGK: Tensor) -> bool:
    """Whether cuDNN is there and takes heads of this dtype, width and grouping; tried once for each, on a few tokens."""
    if torch.version.hip or q_NHK.shape[2] > WIDEST or q_NHK.shape[2] % 8:
        return False
    return _works(q_NHK.device, q_NHK.dtype, q_NHK.shape[2], q_NHK.shape[1] // k_NGK.shape[1])


@cache
def _works(device: torch.device, dtype: torch.dtype, K: int, group: int) -> bool:
    if torch.cuda.get_device_capability(device) < HOPPER or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    try:
        with torch.enable_grad(), torch.cuda.device(device), torch.autocast("cuda", enabled=False):
            q, k, v = (torch.ones(128, heads, K, dtype=dtype, device=device, requires_grad=True) for heads in (group, 1, 1))
            borders = torch.tensor([0, 50, 128, 128], dtype=torch.int32, device=device)
            y = Packed.apply(q, k, v, borders, 128)
            gradients = torch.autograd.grad(y.sum(), (q, k, v))
            right = (y - 1).abs().max() < 0.02  # a mean of ones
            return bool(right & torch.stack([g.isfinite().all() for g in gradients]).all())
    except RuntimeError:  # no plan for this problem
        return False


class Packed(torch.autograd.Function):
    """q (N, H, K), k and v (N, G, K), int32 borders (S + 1,), the longest document -> (N, H, K)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int) -> Tensor:
        made = torch.ops.aten._cudnn_attention_forward(q, k, v, None, borders, borders, longest, longest, True, 0.0, True, False)
        y, logsumexp, seed, offset = made[0], made[1], made[6], made[7]
        ctx.save_for_backward(q, k, v, y, logsumexp, seed, offset, borders)
        ctx.longest = longest
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Any, ...]:
        q, k, v, y, logsumexp, seed, offset, borders = ctx.saved_tensors
        longest = ctx.longest
        made = torch.ops.aten._cudnn_attention_backward(
            d.contiguous(), q, k, v, y, logsumexp, seed, offset, None, borders, borders, longest, longest, 0.0, True
        )
        return *made[:3], None, None
