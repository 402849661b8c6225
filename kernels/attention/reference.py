"""Attention by torch, which chooses the kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the tokens up to each, (B, H, T, K); query heads share key heads in turn where H is not G."""
    grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=q_BHTK.shape[2] > 1, enable_gqa=grouped)
