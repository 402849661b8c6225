"""Problems and the oracle of the decoding step of Mamba-2: token by token, channel by channel, in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int]  # B, H, P, N, G, W
# sizes, dtype, document starts, limits of dt
CASES: list[tuple[Sizes, torch.dtype, bool, float, float]] = [
    ((3, 4, 5, 7, 2, 4), torch.float32, False, 0.0, math.inf),
    ((3, 6, 12, 6, 1, 4), torch.float32, True, 0.3, 0.9),
    ((1, 1, 1, 1, 1, 2), torch.float32, False, 0.0, math.inf),
    ((2, 3, 17, 33, 3, 3), torch.float32, True, 0.0, math.inf),
    ((9, 2, 8, 16, 1, 5), torch.float32, False, 0.0, math.inf),
    ((2, 4, 6, 9, 2, 4), torch.float16, True, 0.0, math.inf),
]


def problem(sizes: Sizes, dtype: torch.dtype, resets: bool, low: float = 0.0, high: float = math.inf, device: str = "cpu") -> list[Any]:
    """All arguments of mamba2_step; the projection is some columns of a wider tensor, and step sizes reach from 1e-6 to 20."""
    B, H, P, N, G, W = sizes
    C = H * P + 2 * G * N
    rows = torch.randn(B, H * P + C + H + 3)
    rows[:, -H - 3 : -3] *= 6
    past, weight, bias = torch.randn(B, W - 1, C), torch.randn(C, W), torch.randn(C)
    dt_bias, A_log, D, ssm = torch.randn(H) - 3, torch.rand(H) * 3, torch.randn(H), torch.randn(B, H, P, N)
    starts = torch.rand(B) < 0.5 if resets else None
    tensors = [rows.to(dtype)[:, :-3], past.to(dtype), weight.to(dtype), bias.to(dtype), dt_bias, A_log, D, ssm]
    moved = [t.to(device) for t in tensors]
    return [*moved, None if starts is None else starts.to(device), G, low, high]


def written_out(
    projected: Tensor, past: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, ssm: Tensor,
    starts: Tensor | None, groups: int, low: float, high: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition in float64, in loops."""
    projected, past, weight, bias, dt_bias, A_log, D, ssm = (
        t.double().cpu() for t in (projected, past, weight, bias, dt_bias, A_log, D, ssm)
    )
    (B, H, P, N), (C, W) = ssm.shape, weight.shape
    y, after, following = torch.empty(B, H, P).double(), torch.empty_like(ssm), torch.empty_like(past)
    for b in range(B):
        fresh = starts is not None and bool(starts[b])
        past_b, state_b = torch.zeros_like(past[b]) if fresh else past[b], torch.zeros_like(ssm[b]) if fresh else ssm[b]
        window = torch.cat([past_b, projected[b, None, H * P : H * P + C]])  # (W, C)
        following[b] = window[1:]
        mixed = bias.clone()
        for w in range(W):
            mixed += weight[:, w] * window[w]
        mixed = mixed / (1 + torch.exp(-mixed))
        for h in range(H):
            g = h // (H // groups)
            x = mixed[h * P : (h + 1) * P]
            into, out = mixed[H * P + g * N :][:N], mixed[H * P + (groups + g) * N :][:N]
            dt = min(max(math.log1p(math.exp(float(projected[b, H * P + C + h] + dt_bias[h]))), low), high)
            after[b, h] = math.exp(-dt * math.exp(float(A_log[h]))) * state_b[h] + dt * torch.outer(x, into)
            y[b, h] = after[b, h] @ out + D[h] * x
    return y.flatten(1), following, after
