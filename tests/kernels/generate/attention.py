"""Random problems for attention within documents and windows.

Legend: B batch, T queries, L keys, H heads, G heads of keys and values, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention import attention
from models.segments import Documents
from tests.kernels.generate.answers import differentiated
from tests.kernels.generate.case import Answers, Draw


def packed_attention(draw: Draw) -> Answers:
    B, L, K = draw.choice([1, 2]), draw.size(200, 513, 1024, small=(1, 2, 5, 16, 17, 33)), draw.size(64, 128, 200, small=(8, 16, 24))
    T = draw.choice([L, L, draw.randrange(1, L + 1)])
    G, R = draw.choice([1, 2]), draw.choice([1, 1, 3])
    dtype = draw.choice([torch.float16, torch.bfloat16]) if draw.device == "cuda" else draw.dtype(interpreter=True)
    starts, window = draw.starts(B, L), draw.choice([0, 0, draw.randrange(1, L + 1)])
    segments = None if starts is None else starts.to(draw.device).cumsum(1)
    size = draw.choice([1.0, 0.1])

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, None if segments is None else Documents(segments).bounds(), window)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for t in range(L - T, L):
            keys = torch.arange(L, device=q.device)
            seen = ((keys <= t) & (keys > t - window if window else keys >= 0)).expand(B, L)
            if segments is not None:
                seen = seen & (segments == segments[:, t : t + 1])
            s = torch.einsum("bgrk,bglk->bgrl", q[:, :, t - L + T].unflatten(1, (G, R)), k) / K**0.5
            p = torch.softmax(s.masked_fill(~seen[:, None, None], float("-inf")), -1)
            rows.append(torch.einsum("bgrl,bglk->bgrk", p, v).flatten(1, 2))
        return torch.stack(rows, 2)

    leaves: dict[str, Tensor | None] = {"q": (size * draw.randn(B, G * R, T, K)).to(dtype)}
    leaves |= {"k": (size * draw.randn(B, G, L, K)).to(dtype), "v": draw.randn(B, G, L, K).to(dtype)}
    description = f"B {B}, T {T}, L {L}, H {G * R}, G {G}, K {K}, window {window}, documents {starts is not None}, {dtype}, size {size}"
    # A query that sees one key has a gradient of zero, the difference of two sums, one of which is of outputs as they were rounded.
    return differentiated(draw, own, exact, leaves, ("y",), description, 200.0 if dtype == torch.float32 else 8.0, dtype)
