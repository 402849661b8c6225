"""Random problems for M2RNN, whose matrix states are not linear.

Legend: B batch, T tokens, H heads, G groups of queries and keys, K rows and V columns of a state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.m2rnn import m2rnn
from kernels.m2rnn.reference import m2rnn_sequential
from tests.kernels.generate.answers import differentiated
from tests.kernels.generate.case import Answers, Draw


def matrix_states(draw: Draw) -> Answers:
    """Weights that do not expand: of a chaotic recurrence every rounding grows."""
    B, G, R = draw.choice([1, 2, 3]), draw.choice([1, 2]), draw.choice([1, 1, 2])
    T, H = draw.size(64, 65, 129, 257, small=(1, 2, 7, 16, 65)), G * R
    K, V = draw.size(24, 64, 70, 128, small=(1, 5, 16, 17)), draw.size(24, 31, 64, small=(1, 5, 16))
    dtype = draw.dtype()
    q, k, v = draw.randn(B, T, G, K), draw.randn(B, T, G, K), draw.randn(B, T, H, V)
    regime = draw.choice(["none", "slow", "fast", "nothing"])
    g = -draw.rand(B, T, H) * {"none": 0.0, "slow": 1e-2, "fast": 5.0, "nothing": 0.1}[regime]
    if regime == "nothing":
        g = torch.where(draw.rand(B, T, H) < 0.2, -math.inf, g)
    w = draw.choice([0.1, 0.4]) * (torch.eye(V) + V**-0.5 * draw.randn(H, V, V))
    if dtype == torch.bfloat16:
        w = w.bfloat16().float()  # enters the product so
    leaves: dict[str, Tensor | None] = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "g": g, "w": w}
    leaves["h0"] = draw.randn(B, H, K, V) if draw.chance(0.6) else None
    starts = draw.starts(B, T)
    starts = None if starts is None else starts.to(draw.device)
    return differentiated(
        draw, lambda *t: m2rnn(*(*t, starts)), lambda *t: m2rnn_sequential(*(*t, starts)), leaves, ("o", "final"),
        f"B {B}, T {T}, H {H}, G {G}, K {K}, V {V}, {dtype}, {regime}", 8.0 if dtype != torch.float32 else 16.0, dtype, True,
    )  # fmt: skip
