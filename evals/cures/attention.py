"""The cure that acts on our attention layers: the Lambda mask of LM-Infinite.

Legend: B batch, T new tokens, Q queries of a block, L keys, H query heads, G key heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from evals.adapters.base import Adapter, ItemError
from evals.adapters.own import OwnAdapter
from evals.cures.setting import Setting
from models.mixers.attention import Mixer, State


def attention_layers(adapter: Adapter) -> list[Any]:
    """Our full-attention mixers (those with a window of their own need no mask)."""
    if not isinstance(adapter, OwnAdapter):
        return []
    blocks: Any = adapter.model.blocks
    return [b.mixer for b in blocks if isinstance(b.mixer, Mixer) and not b.mixer.config.window]


@contextmanager
def lambda_mask(adapter: Adapter, setting: Setting, first: float = 10, local: float = 0) -> Iterator[None]:
    """Query i sees key j if i - j < L or j < first (the Lambda mask), and no distance counts as more than L (LM-Infinite, arXiv 2308.16137).

    L = local, 0 takes T. With rotary positions the capped score of a far first token is that of the query rotated to position L and the
    unrotated key. The cache holds first + L tokens, so memory does not grow.
    """
    mixers = attention_layers(adapter)
    if not mixers:
        raise ItemError(f"{adapter.kind} has no attention layer of ours without a window, so there is nothing to mask.")
    L = int(local) or setting.train_length
    for mixer in mixers:
        mixer.forward = _lambda_forward(mixer, int(first), L)
    try:
        yield
    finally:
        for mixer in mixers:
            del mixer.forward  # deleting the instance's forward restores that of the class


def _lambda_forward(mixer: Any, first: int, local: int) -> Callable[..., Any]:
    """A forward of the mixer under the mask, with the mixer's own weights and state."""
    from kernels.rotary.reference import rotate

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, *mixer.turned(positions)) if mixer.config.rope else x

    def forward(x_BTD: Tensor, state: Any = None, segment_ids: Any = None, documents: Any = None) -> tuple[Tensor, Any]:
        assert segment_ids is None, "evaluations feed one document at a time"
        B, T, _ = x_BTD.shape
        q = mixer.q_proj(x_BTD).view(B, T, mixer.H, mixer.K).transpose(1, 2)
        k = mixer.k_proj(x_BTD).view(B, T, mixer.G, mixer.K).transpose(1, 2)
        v = mixer.v_proj(x_BTD).view(B, T, mixer.G, mixer.K).transpose(1, 2)
        q, k = mixer._normed(q, k)
        tokens_before = state.seen if state is not None else 0
        new = torch.arange(tokens_before, tokens_before + T, device=x_BTD.device)
        place, far_q = new, turn(q, torch.full_like(new, local))
        q, k = turn(q, new), turn(k, new)
        if state is not None:
            cached = state.k_BGLK.shape[2]
            k, v = torch.cat([state.k_BGLK.to(k.dtype), k], 2), torch.cat([state.v_BGLK.to(v.dtype), v], 2)
            old = torch.arange(cached, device=x_BTD.device)
            place = torch.cat([torch.where(old < first, old, old + tokens_before - cached), new])  # the first tokens, then the last ones
        y = _lambda_attention(q, far_q, k, v, new, place, first, local, turn)
        y = mixer.o_proj(mixer._gated(y.transpose(1, 2).reshape(B, T, mixer.H * mixer.K), x_BTD))
        if state is None:
            return y, None
        keep = (place < first) | (place > tokens_before + T - 1 - local)
        return y, State(k[:, :, keep], v[:, :, keep], None, tokens_before + T)

    return forward


def _lambda_attention(
    q: Tensor, far_q: Tensor, k: Tensor, v: Tensor, query_T: Tensor, key_L: Tensor, first: int, local: int, turn: Any, block: int = 256
) -> Tensor:
    """Exact softmax over the window and the first tokens, a block of queries at a time. q, far_q (B, H, T, K); k, v (B, G, L, K)."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    n = int((key_L < first).sum())  # the first tokens stand in front of the cache
    unrotated = turn(k[:, :, :n], -key_L[:n])
    parts = []
    for a in range(0, q.shape[2], block):
        rows = slice(a, a + block)
        distance = query_T[rows, None] - key_L
        scores = torch.matmul(q[:, :, rows], k.transpose(-1, -2)).to(wide) * scale
        if n:
            far = torch.matmul(far_q[:, :, rows], unrotated.transpose(-1, -2)).to(wide) * scale
            scores = torch.cat([torch.where(distance[:, :n] >= local, far, scores[..., :n]), scores[..., n:]], -1)
        allowed = (distance >= 0) & ((distance < local) | (key_L < first))
        parts.append(torch.matmul(scores.masked_fill(~allowed, -math.inf).softmax(-1).to(v.dtype), v))
    return torch.cat(parts, 2)
