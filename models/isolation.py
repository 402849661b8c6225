"""Keeps what is not finite within its document where attention is one product over packed documents under a mask.

Legend: B batch, T new tokens, L cached and new tokens, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def isolated(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, H, T, 1): the queries that are not finite, or see a token that is not; and queries, keys and values with zeros for those. A mask does
    not keep them apart, as it adds -inf to a NaN, and multiplies one by zero. A segment's tokens are neighbours."""
    (_, H, T, _), (_, G, L, _) = q_BHTK.shape, k_BGLK.shape
    fine_BGL = torch.isfinite(k_BGLK).all(-1) & torch.isfinite(v_BGLK).all(-1)
    place = torch.arange(L, device=q_BHTK.device)
    changes_BL = F.pad(segments_BL[:, 1:] != segments_BL[:, :-1], (1, 0), value=True)
    first_BL = torch.where(changes_BL, place, 0).cummax(1).values
    if window:
        first_BL = torch.maximum(first_BL, place - window + 1)
    last_BGL = torch.where(fine_BGL, -1, place).cummax(2).values  # the last such token so far
    lost_BHT1 = (last_BGL >= first_BL[:, None])[..., L - T :].repeat_interleave(H // G, 1)[..., None] | ~torch.isfinite(q_BHTK).all(
        -1, keepdim=True
    )
    k, v = (torch.where(fine_BGL[..., None], t, 0.0) for t in (k_BGLK, v_BGLK))
    return lost_BHT1, torch.where(lost_BHT1, 0.0, q_BHTK), k, v


class Lost(torch.autograd.Function):
    """What was read, NaN where something is lost. There, and where the gradient is not finite, that of the queries is NaN, and none goes on to
    keys and values, which other documents' lie beside."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, q: Tensor, lost: Tensor) -> Tensor:
        ctx.save_for_backward(lost)
        return torch.where(lost, torch.nan, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        d = gradients[0]
        lost = ctx.saved_tensors[0] | ~torch.isfinite(d).all(-1, keepdim=True)
        return torch.where(lost, 0.0, d), torch.where(lost, torch.nan, torch.zeros_like(d)), None
