"""causal_attention, packed_attention: torch's attention by the kernel that is fastest on the device.

On Hopper cuDNN's kernels take half the time of torch's FlashAttention-2, which torch prefers. Whether they run for a dtype, head width and
grouping is tried once on a few tokens, forward and backward; where they do not, torch chooses as it always does.

Legend: B batch, T time, H query heads, G key/value heads, K head width, S documents.
"""

from __future__ import annotations

from torch import Tensor

from kernels.attention import cudnn, reference
from kernels.dispatch import plain


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the tokens up to each, (B, H, T, K); query heads share key heads in turn where H is not G."""
    if q_BHTK.shape[2] > 1 and plain(q_BHTK) and cudnn.takes(q_BHTK, k_BGTK, v_BGTK, packed=False):
        return cudnn.causal(q_BHTK, k_BGTK, v_BGTK)
    return reference.causal_attention(q_BHTK, k_BGTK, v_BGTK)


def packed_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, bounds_S: Tensor, window: int) -> Tensor:
    """Causal attention within documents of rows laid end to end, (B, H, T, K), within `window` tokens if above 0.

    bounds (S + 1,), int32 on the device: where each document begins in B T tokens, and their end; documents of no tokens may follow.
    """
    from torch.nn.attention import varlen  # loads torch.compile

    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHTK, k_BGTK.to(q_BHTK.dtype), v_BGTK.to(q_BHTK.dtype)))
    if not window and cudnn.takes(q_BHTK, k_BGTK, v_BGTK, packed=True):
        y = cudnn.Packed.apply(q, k, v, bounds_S, T)
    else:
        if G != H:
            k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        y = varlen.varlen_attn(q, k, v, bounds_S, bounds_S, T, T, window_size=(window - 1 if window else -1, 0))
    return y.view(B, T, H, K).transpose(1, 2)
