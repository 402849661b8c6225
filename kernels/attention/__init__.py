"""packed_attention: causal attention within documents of packed rows, by cuDNN where it is ahead of torch's FlashAttention-2.

Legend: B batch, T time, H query heads, G key/value heads, K head width, S documents.
"""

from __future__ import annotations

from torch import Tensor

from kernels.attention import cudnn


def packed_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, borders_S: Tensor, window: int) -> Tensor:
    """(B, H, T, K), within `window` tokens if above 0; on a GPU, in bf16 or fp16, K a multiple of 8 up to 256.

    borders (S + 1,), int32 on the device: where each document begins in the B T tokens of all rows laid end to end, and their end; documents
    of no tokens may follow, so that the number of borders need not depend on the data.
    """
    from torch.nn.attention import varlen  # loads torch.compile

    (B, H, T, K), G = q_BHTK.shape, k_BGTK.shape[1]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BHTK, k_BGTK.to(q_BHTK.dtype), v_BGTK.to(q_BHTK.dtype)))
    if not window and cudnn.takes(q, k):
        y = cudnn.Packed.apply(q, k, v, borders_S, T)
    else:
        if G != H:
            k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        y = varlen.varlen_attn(q, k, v, borders_S, borders_S, T, T, window_size=(window - 1 if window else -1, 0))
    return y.view(B, T, H, K).transpose(1, 2)
