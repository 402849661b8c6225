"""Softmax attention within documents and windows, by the kernel that suits: packed documents as they lie (our kernels, or torch's), one
document at a time, blocks of a window, or torch's own under a mask.

Queries (B, H, T, K) are the last T of the L tokens whose keys and values (B, G, L, K) are given. `window` above 0: a query sees itself and
the window-1 tokens before it. Legend: B batch, T queries, L keys, H query heads, G key/value heads, K head width, W window, C blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention
from kernels.dispatch import interpreted, is_eager, planned, planned_compiled
from models.isolation import Lost, isolated
from models.segments import Documents

MASK_ELEMENTS = 1 << 27  # the largest mask of packed documents that is held; beyond it they are taken one by one
LONG = 8192  # tokens of a mean document from which attention within one alone, by a better kernel, beats that of all together
PACKED_DTYPES = (torch.float16, torch.bfloat16)  # of which torch has kernels that take packed documents as they lie, without a mask
own_kernels = "auto"  # kernels.attention rather than torch's: where it can run ("own"), where it is faster ("auto"), or nowhere ("torch")
FASTER = (64, 128)  # widths of heads of 16 bits at which it was, on an H100, right and faster than torch's for packed documents


def attend(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, documents: Documents | None, window: int) -> Tensor:
    """(B, H, T, K). documents: those of the L tokens, or None for one a row."""
    T, L = q_BHTK.shape[2], k_BGLK.shape[2]
    if not T:
        return q_BHTK + 0 * (k_BGLK.sum() + v_BGLK.sum())  # for autograd: gradients of zero, not none
    divided = documents is not None or 0 < window < L  # some tokens are kept apart
    if divided and packable(q_BHTK) and T == L:
        if documents is not None and not window and L >= LONG and not planned() and not is_captured(q_BHTK):
            if documents.segments_BL.numel() >= LONG * (len(documents.borders()) - 1):
                return documents_one_by_one(q_BHTK, k_BGLK, v_BGLK, documents)
        if not _ours(q_BHTK):
            return packed_attention(q_BHTK, k_BGLK, v_BGLK, documents, window)
    if divided and T > 1 and _ours(q_BHTK):
        return _by_ours(q_BHTK, k_BGLK, v_BGLK, documents, window)
    if documents is not None:
        lost_BHT1, q, k, v = isolated(q_BHTK, k_BGLK, v_BGLK, documents.segments_BL, window)
        return Lost.apply(_attend_masked(q, k, v, documents, window), q_BHTK, lost_BHT1)
    return _attend_masked(q_BHTK, k_BGLK, v_BGLK, None, window)


def _ours(q_BHTK: Tensor) -> bool:
    """Whether kernels.attention takes these queries."""
    if own_kernels == "torch" or attention.why_not(q_BHTK):
        return False
    return own_kernels == "own" or interpreted() or q_BHTK.dtype in PACKED_DTYPES and q_BHTK.shape[-1] in FASTER


def _by_ours(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, documents: Documents | None, window: int) -> Tensor:
    return attention.attention(q_BHTK, k_BGLK, v_BGLK, None if documents is None else documents.bounds(), window)


def sdpa(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, *, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
    """torch's scaled_dot_product_attention; while memory is planned, what a GPU's kernels keep of it."""
    if planned():
        return _kept_by_fused_kernels(q_BHTK, k_BGLK, v_BGLK, attn_mask, is_causal)
    grouped = q_BHTK.shape[1] != k_BGLK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGLK, v_BGLK, attn_mask=attn_mask, is_causal=is_causal, enable_gqa=grouped)


def _kept_by_fused_kernels(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, is_causal: bool) -> Tensor:
    """A boolean mask becomes a bias in the dtype of the queries; queries, keys, values, output and one logarithm a row are kept."""
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if t.shape[1] != q.shape[1] else t for t in (k, v))
    bias = None
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
        bias = torch.where(attn_mask, 0.0, float("-inf")).to(dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is made of what happens, so that nothing may wait for the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def packable(q_BHTK: Tensor) -> bool:
    """Whether `packed_attention` can run: on a GPU for queries of some dtypes and widths, while nobody traces."""
    if not (q_BHTK.dtype in PACKED_DTYPES and q_BHTK.shape[-1] % 8 == 0 and q_BHTK.shape[-1] <= 256):
        return False
    if planned():
        return not planned_compiled()
    return q_BHTK.is_cuda and is_eager(q_BHTK) and not torch.version.hip


def packed_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, documents: Documents | None, window: int) -> Tensor:
    """Causal attention within documents (rows, without them) by FlashAttention of packed sequences."""
    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    if planned():  # the same memory, and no document has to be looked up
        return sdpa(q_BHTK, k_BGTK, v_BGTK, is_causal=True)
    from torch.nn.attention import varlen  # loads torch.compile

    if documents is None:
        borders = torch.arange(0, B * T + 1, T, device=q_BHTK.device, dtype=torch.int32)
    else:
        borders = documents.borders()
    if G != H:
        k_BGTK, v_BGTK = k_BGTK.repeat_interleave(H // G, 1), v_BGTK.repeat_interleave(H // G, 1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHTK, k_BGTK, v_BGTK.to(q_BHTK.dtype)))
    y = varlen.varlen_attn(q, k.to(q.dtype), v, borders, borders, T, T, window_size=(window - 1 if window else -1, 0))
    return y.view(B, T, H, K).transpose(1, 2)


def _attend_masked(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, documents: Documents | None, window: int) -> Tensor:
    """By torch's attention, with a mask where there must be one."""
    T, L = q_BHTK.shape[2], k_BGLK.shape[2]
    segments_BL = None if documents is None else documents.segments_BL
    if window and T > window:
        return attend_in_blocks(q_BHTK, k_BGLK, v_BGLK, segments_BL, window)
    if segments_BL is None and not (window and window < L):  # no mask in memory
        if T in (1, L):
            return sdpa(q_BHTK, k_BGLK, v_BGLK, is_causal=T > 1)
        return sdpa(q_BHTK, k_BGLK, v_BGLK, attn_mask=causal_mask(T, L))
    if documents is not None and not window and documents.segments_BL.shape[0] * T * L > MASK_ELEMENTS:
        return documents_one_by_one(q_BHTK, k_BGLK, v_BGLK, documents)
    ahead = torch.arange(L - T, L, device=q_BHTK.device)[:, None] - torch.arange(L, device=q_BHTK.device)
    seen_TL = ahead >= 0
    if window:
        seen_TL = seen_TL & (ahead < window)
    mask = seen_TL[None, None]
    if segments_BL is not None:
        mask = mask & (segments_BL[:, None, -T:, None] == segments_BL[:, None, None, :])
    return sdpa(q_BHTK, k_BGLK, v_BGLK, attn_mask=mask)


def causal_mask(T: int, L: int) -> Tensor:
    """The mask under which the last of T queries sees all of L keys, one before it L - 1, and so on; torch never writes it out."""
    from torch.nn.attention.bias import causal_lower_right  # loads torch.compile, more than a second that most programs need not wait

    return causal_lower_right(T, L)


@torch._disable_dynamo  # torch.compiler.disable, but loading the compiler when it is called
def documents_one_by_one(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, documents: Documents) -> Tensor:
    """One document at a time, so that no mask is held: for long sequences, whose documents are large enough to fill a device. Waits for it."""
    T, L, rows = q_BHTK.shape[2], k_BGLK.shape[2], []
    for b, cuts in enumerate(documents.cuts()):
        parts = []
        for a, e in zip(cuts, cuts[1:]):
            if e <= L - T:
                continue
            n = e - max(a, L - T)
            q, k, v = q_BHTK[b : b + 1, :, e - n - (L - T) : e - (L - T)], k_BGLK[b : b + 1, :, a:e], v_BGLK[b : b + 1, :, a:e]
            if n in (1, e - a):
                parts.append(sdpa(q, k, v, is_causal=n > 1))
            else:
                parts.append(sdpa(q, k, v, attn_mask=causal_mask(n, e - a)))
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def attend_in_blocks(q_BHTK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor | None, W: int) -> Tensor:
    """A window W in O(T W) time and memory: each block of W queries sees its own block of keys and the one before."""
    B, _, T, _ = q_BHTK.shape
    cached = k_BGLK.shape[2] - q_BHTK.shape[2]  # at most W - 1
    before, after, C = W - cached, -T % W, -(-T // W)
    none = -(2**31)  # segment of the padding; a document's id is never this
    if segments_BL is None:
        segments_BL = torch.zeros(B, k_BGLK.shape[2], device=q_BHTK.device, dtype=torch.int32)
    keys = F.pad(segments_BL.to(torch.int32), (before, after), value=none).unfold(1, 2 * W, W)  # (B, C, 2W)
    k, v = (F.pad(t, (0, 0, before, after)).unfold(2, 2 * W, W).permute(0, 2, 1, 4, 3).flatten(0, 1) for t in (k_BGLK, v_BGLK))
    q = F.pad(q_BHTK, (0, 0, 0, after)).unflatten(2, (C, W)).transpose(1, 2).flatten(0, 1)  # (B C, H, W, K)
    ahead = torch.arange(W, 2 * W, device=q.device)[:, None] - torch.arange(2 * W, device=q.device)
    # A padded query sees padding: finite, and cut off below.
    mask = (ahead >= 0) & (ahead < W) & (keys[:, :, W:, None] == keys[:, :, None, :])
    y = sdpa(q, k, v, attn_mask=mask.flatten(0, 1)[:, None])
    return y.unflatten(0, (B, C)).transpose(1, 2).flatten(2, 3)[:, :, :T]
