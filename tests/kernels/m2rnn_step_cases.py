"""Problems and the oracle of the decoding step of M2RNN: token by token, channel by channel, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int]  # B, H, K, V, G, W
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int]

# sizes, dtype, document starts
CASES: list[tuple[Sizes, torch.dtype, bool]] = [
    ((2, 4, 7, 5, 2, 4), torch.float32, False),
    ((2, 3, 6, 12, 1, 4), torch.float32, True),
    ((1, 1, 1, 1, 1, 2), torch.float32, False),
    ((1, 2, 33, 17, 2, 3), torch.float32, True),
    ((2, 4, 9, 6, 2, 5), torch.float16, True),
]


def problem(B: int, H: int, K: int, V: int, G: int, W: int, dtype: torch.dtype, resets: bool, device: str = "cpu") -> Arguments:
    """Arguments of m2rnn_step; the projection is some columns of a wider tensor, and gates reach from 1 - 1e-6 to exp(-20)."""
    C = 2 * G * K + H * V
    rows = torch.randn(B, 5 + C + H + 3)
    rows[:, -H - 3 : -3] *= 5
    past, weight = torch.randn(B, W - 1, C), torch.randn(C, W)
    dt_bias, A_log, state = torch.randn(H) - 3, torch.rand(H) * 3 - 1, torch.randn(B, H, K, V)
    state_weight, skip = torch.randn(H, V, V) * V**-0.5, torch.randn(H, V)
    starts = (torch.rand(B) < 0.5).to(device) if resets else None
    projected, past, weight = (t.to(device) for t in (rows.to(dtype)[:, :-3], past.to(dtype), weight.to(dtype)))
    rates = dt_bias.to(device), A_log.to(device)
    return projected, past, weight, *rates, state_weight.to(device), skip.to(device), state.to(device), starts, G


def written_out(
    projected: Tensor, past: Tensor, weight: Tensor, dt_bias: Tensor, A_log: Tensor, state_weight: Tensor, skip: Tensor, state: Tensor,
    starts: Tensor | None, groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition in float64, in loops."""
    projected, past, weight, state_weight, skip, state = (t.double().cpu() for t in (projected, past, weight, state_weight, skip, state))
    (B, H, K, V), C, G = state.shape, len(weight), groups
    rows = projected[:, projected.shape[1] - C - H :]
    o, after, following = torch.empty(B, H, V).double(), state.clone(), torch.empty_like(past)
    for b in range(B):
        fresh = starts is not None and bool(starts[b])
        window = torch.cat([torch.zeros_like(past[b]) if fresh else past[b], rows[b, None, :C]])  # (W, C)
        following[b] = window[1:]
        mixed = (weight.T * window).sum(0)
        mixed = mixed / (1 + torch.exp(-mixed))
        queries, keys, values = mixed.split([G * K, G * K, H * V])
        for h in range(H):
            before = torch.zeros(K, V).double() if fresh else state[b, h]
            key, query = (x.view(G, K)[h // (H // G)] for x in (keys, queries))
            g = -math.exp(float(A_log[h])) * math.log1p(math.exp(float(rows[b, C + h] + dt_bias[h])))
            new = torch.tanh(before @ state_weight[h] + torch.outer(key, values.view(H, V)[h]))
            after[b, h] = math.exp(g) * before - math.expm1(g) * new
            o[b, h] = query @ after[b, h] + skip[h] * values.view(H, V)[h]
    return o.flatten(1), following, after
