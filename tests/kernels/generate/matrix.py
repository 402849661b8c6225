"""Random problems for M2RNN, whose matrix states are not linear.

Legend: B batch, T tokens, H heads, G groups of queries and keys, K rows and V columns of a state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.m2rnn import m2rnn
from kernels.m2rnn.reference import m2rnn_sequential
from kernels.m2rnn_step import m2rnn_step
from tests.kernels.generate.answers import compared, differentiated, widened
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


def matrix_token(draw: Draw) -> Answers:
    """One token of M2RNN between its projections, on states of any strides, some rows starting a document though their state is not finite."""
    B, G, R = draw.choice([1, 2, 5]), draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    K, V, W, H = draw.size(24, 64, 70), draw.size(16, 31, 64), draw.choice([2, 3, 4, 5]), G * R
    dtype, C = draw.dtype(interpreter=True), 2 * G * K + H * V
    rows = draw.randn(B, H * V + C + H)
    rows[:, -H:] *= 6
    past, weight = draw.randn(B, W - 1, C).to(dtype), draw.randn(C, W).to(dtype)
    per_head = (draw.randn(H) - 3, 3 * draw.rand(H), draw.randn(H, V, V) * V**-0.5, draw.randn(H, V))
    memory, starts = draw.magnitude(-4, 4) * draw.randn(B, H, K, V), draw.rand(B) < 0.5 if draw.chance(0.5) else None
    if starts is not None:
        memory[starts], past[starts] = math.nan, math.inf
    order = draw.choice([(0, 1, 2, 3), (3, 1, 0, 2), (0, 2, 1, 3)])
    back = [order.index(i) for i in range(4)]
    state = memory.permute(order).contiguous().permute(back).to(draw.device)
    given = [draw.laid(rows.to(dtype).to(draw.device)), *(t.to(draw.device) for t in (past, weight, *per_head))]
    fresh = None if starts is None else starts.to(draw.device)

    def exact(kind: torch.dtype) -> list[Tensor]:
        row, past_, w, dt_bias, A_log, mixer, skip, h = widened([*given, state], kind)
        if fresh is not None:
            past_, h = torch.where(fresh[:, None, None], 0.0, past_), torch.where(fresh[:, None, None, None], 0.0, h)
        window = torch.cat([past_, row[:, None, H * V : H * V + C]], 1)
        mixed = (window * w.T).sum(1)
        q, k, v = (mixed * torch.sigmoid(mixed)).split([G * K, G * K, H * V], 1)
        q, k = (t.unflatten(1, (G, K)).repeat_interleave(R, 1) for t in (q, k))
        v = v.unflatten(1, (H, V))
        g = (-torch.exp(A_log) * F.softplus(row[:, -H:] + dt_bias, threshold=1e9 if kind == torch.float64 else 20))[..., None, None]
        h = torch.exp(g) * h - torch.expm1(g) * torch.tanh(h @ mixer + k[..., None] * v[:, :, None])
        return [((q[..., None] * h).sum(2) + skip * v).flatten(1), window[:, 1:], h]

    in_place = draw.chance(0.5)
    wanted, loop = exact(torch.float64), exact(torch.float32)
    computed = m2rnn_step(*(*given, state, fresh, G, in_place))
    assert not in_place or computed[2] is state
    label = f"B {B}, H {H}, G {G}, K {K}, V {V}, W {W}, {dtype}, order {order}"
    return compared(("o", "past", "state"), computed, wanted, loop, label, 5.0, draw.within(dtype))
