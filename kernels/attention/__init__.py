"""attention: causal softmax attention within documents and windows, in 16 bits, where documents are data and not shapes.

For packed rows: borders are two numbers a token that stay on the device, so a CUDA graph can hold it and nothing waits. What is not finite stays
in its document. Legend: B batch, T queries, L keys (the last T of them the queries' own), H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import interpreted, is_eager

__all__ = ["attention", "why_not"]

DTYPES = (torch.bfloat16, torch.float16)
WIDEST = 256
CAPABILITIES = (9, 10)  # with 227 KiB of shared memory for a program


def why_not(q_BHTK: Tensor) -> str:
    """Empty if the kernels can run on these queries, else one sentence."""
    if q_BHTK.dtype not in DTYPES and not (interpreted() and q_BHTK.dtype == torch.float32):
        return f"Kernels of attention take 16 bits, not {q_BHTK.dtype}."
    if q_BHTK.shape[-1] > WIDEST:
        return f"Kernels of attention take heads up to {WIDEST} wide."
    if interpreted():
        return ""
    if q_BHTK.device.type != "cuda" or torch.version.hip or not is_eager(q_BHTK):
        return "Kernels of attention need a tensor on an NVIDIA GPU that nobody traces."
    if torch.cuda.get_device_capability(q_BHTK.device)[0] not in CAPABILITIES:
        return "Kernels of attention need the shared memory of an H100 or a B200."
    return ""


def attention(
    q_BHTK: Tensor,
    k_BGLK: Tensor,
    v_BGLK: Tensor,
    bounds: tuple[Tensor, Tensor] | None = None,
    window: int = 0,
    scale: float | None = None,
) -> Tensor:
    """(B, H, T, K), the heads of a token beside each other in memory. Differentiable once.

    bounds: int32 (B, L) each: the first and the last token of each token's document, which lie together; None: a row is a document.
    window: a query sees itself and the window-1 tokens before it; 0: all. scale: of the products, by default 1 / sqrt(K)."""
    from kernels.attention import launch, op

    K = q_BHTK.shape[-1]
    k_BGLK, v_BGLK = k_BGLK.to(q_BHTK.dtype), v_BGLK.to(q_BHTK.dtype)
    more = next(width for width in launch.WIDTHS if width >= K) - K
    if more:
        q_BHTK, k_BGLK, v_BGLK = (F.pad(t, (0, more)) for t in (q_BHTK, k_BGLK, v_BGLK))
    first, last = bounds if bounds is not None else (None, None)
    y_BHTK = op.attention(q_BHTK, k_BGLK, v_BGLK, first, last, window, K**-0.5 if scale is None else scale)[0]
    return y_BHTK[..., :K]
