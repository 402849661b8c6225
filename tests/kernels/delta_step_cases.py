"""Problems and the oracle of the decoding step of the delta rule: token by token, channel by channel, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int, int]  # B, H, V, K, G, n, W
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, int, int]  # of delta_step up to `updates`

# sizes, dtype, document starts, gated, strength
CASES: list[tuple[Sizes, torch.dtype, bool, bool, float]] = [
    ((2, 4, 5, 7, 2, 1, 4), torch.float32, False, True, 1.0),
    ((2, 3, 12, 6, 1, 3, 4), torch.float32, True, True, 2.0),
    ((1, 1, 1, 1, 1, 1, 2), torch.float32, False, False, 1.0),
    ((1, 3, 17, 33, 3, 2, 3), torch.float32, True, False, 2.0),
    ((2, 2, 8, 16, 1, 1, 5), torch.float32, True, True, 1.0),
    ((2, 4, 6, 9, 2, 2, 4), torch.float16, True, True, 2.0),
]


def problem(
    B: int, H: int, V: int, K: int, G: int, n: int, W: int, dtype: torch.dtype, resets: bool, gated: bool, device: str = "cpu"
) -> Arguments:
    """Arguments of delta_step up to `updates`; the projection is some columns of a wider tensor, and gates reach from 1 to exp(-20)."""
    C = G * K * (n + 1) + n * H * V
    rows = torch.randn(B, 5 + C + n * H + gated * H + 3)
    rows[:, -H - 3 : -3] *= 4
    past, weight = torch.randn(B, W - 1, C), torch.randn(C, W)
    dt_bias, A_log, delta = torch.randn(H) - 3, torch.rand(H) * 3, torch.randn(B, H, V, K)
    starts = (torch.rand(B) < 0.5).to(device) if resets else None
    projected, past, weight = (t.to(device) for t in (rows.to(dtype)[:, :-3], past.to(dtype), weight.to(dtype)))
    rates = (dt_bias.to(device), A_log.to(device)) if gated else (None, None)
    return projected, past, weight, *rates, delta.to(device), starts, G, n


def written_out(
    projected: Tensor, past: Tensor, weight: Tensor, dt_bias: Tensor | None, A_log: Tensor | None, delta: Tensor, starts: Tensor | None,
    groups: int, updates: int, strength: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition in float64, in loops."""
    projected, past, weight, delta = (t.double().cpu() for t in (projected, past, weight, delta))
    (B, H, V, K), C, n, G = delta.shape, len(weight), updates, groups
    rows = projected[:, projected.shape[1] - C - n * H - (H if dt_bias is not None else 0) :]
    o, after, following = torch.empty(B, H, V).double(), delta.clone(), torch.empty_like(past)
    for b in range(B):
        fresh = starts is not None and bool(starts[b])
        window = torch.cat([torch.zeros_like(past[b]) if fresh else past[b], rows[b, None, :C]])  # (W, C)
        following[b] = window[1:]
        mixed = (weight.T * window).sum(0)
        mixed = mixed / (1 + torch.exp(-mixed))
        queries, keys, values = mixed.split([G * K, n * G * K, n * H * V])
        for h in range(H):
            state = torch.zeros(V, K).double() if fresh else delta[b, h].clone()
            if dt_bias is not None and A_log is not None:
                state *= math.exp(-math.exp(float(A_log[h])) * math.log1p(math.exp(float(rows[b, C + n * H + h] + dt_bias[h]))))
            for u in range(n):
                key = keys.view(n, G, K)[u, h // (H // G)]
                key = key / math.sqrt(float(key @ key) + 1e-6)
                strong = strength / (1 + math.exp(-float(rows[b, C + u * H + h])))
                state += strong * torch.outer(values.view(n, H, V)[u, h] - state @ key, key)
            query = queries.view(G, K)[h // (H // G)]
            o[b, h] = scale * state @ query / math.sqrt(float(query @ query) + 1e-6)
            after[b, h] = state
    return o.flatten(1), following, after
