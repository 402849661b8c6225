"""Softmax attention within documents and windows in plain torch: the oracle, and what runs where Triton cannot.

Legend: B batch, T queries, L keys, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seen(first_BL: Tensor | None, T: int, L: int, window: int, device: torch.device) -> Tensor:
    """(B or 1, 1, T, L) bool: which keys a query sees."""
    key = torch.arange(L, device=device)
    place = key[L - T :]
    begin = torch.zeros(1, T, dtype=torch.int64, device=device) if first_BL is None else first_BL[:, L - T :].long()
    if window:
        begin = torch.maximum(begin, place - window + 1)
    return ((key >= begin[..., None]) & (key <= place[:, None]))[:, None]


def _logits(q_BHTK: Tensor, k_BGLK: Tensor, first_BL: Tensor | None, window: int, scale: float) -> Tensor:
    wide = torch.promote_types(q_BHTK.dtype, torch.float32)
    (_, H, T, _), (_, G, L, _) = q_BHTK.shape, k_BGLK.shape
    s = q_BHTK.to(wide) @ k_BGLK.to(wide).repeat_interleave(H // G, 1).mT * scale
    return s.masked_fill(~seen(first_BL, T, L, window, q_BHTK.device), float("-inf"))


def attention(
    q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, first_BL: Tensor | None, last_BL: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(y (B, H, T, K), logarithm of the softmax's sum to base 2 (B, H, T))."""
    s = _logits(q_BHTK, k_BGLK, first_BL, window, scale)
    y = torch.softmax(s, -1) @ v_BGLK.to(s.dtype).repeat_interleave(q_BHTK.shape[1] // v_BGLK.shape[1], 1)
    return y, s.logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=s.dtype))


def attention_backward(
    d_BHTK: Tensor, _: Tensor | None, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, y: Tensor, lse: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values."""
    p = torch.softmax(_logits(q, k, first, window, scale), -1)
    d, wide = d_BHTK.to(p.dtype), p.dtype
    H, G = q.shape[1], k.shape[1]
    k_H, v_H = (t.to(wide).repeat_interleave(H // G, 1) for t in (k, v))
    ds = p * (d @ v_H.mT - (d * (p @ v_H)).sum(-1, keepdim=True)) * scale
    dk, dv = ds.mT @ q.to(wide), p.mT @ d
    return ds @ k_H, dk.unflatten(1, (G, H // G)).sum(2), dv.unflatten(1, (G, H // G)).sum(2)
