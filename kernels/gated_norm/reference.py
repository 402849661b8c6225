"""RMSNorm with a SiLU gate in plain torch, in float64 if its input is: the oracle, and what runs where the kernels cannot.

Legend: D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_norm(
    h: Tensor,
    gate: Tensor | None,
    weight_D: Tensor,
    eps: float,
    groups: int = 1,
    norm_first: bool = False,
    dtype: torch.dtype | None = None,
    *,
    columns: object = None,
) -> Tensor:
    """y (..., D); arguments as of `kernels.gated_norm.gated_norm`. Here columns change nothing."""
    inner = torch.promote_types(h.dtype, torch.float32)
    y, weight = h.to(inner), weight_D.to(inner)
    if gate is not None and not norm_first:
        y = y * F.silu(gate.to(inner))
    grouped = y.unflatten(-1, (groups, -1))
    y = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    if gate is not None and norm_first:
        y = y * F.silu(gate.to(inner))
    return y.to(dtype or h.dtype)


def gated_norm_backward(
    dy: Tensor, h: Tensor, gate: Tensor | None, weight_D: Tensor, eps: float, groups: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gate (empty without one) and weight in fp32 (fp64), written out: what the operation does without kernels."""
    inner = torch.promote_types(h.dtype, torch.float32)
    x, weight, dy = h.to(inner), weight_D.to(inner), dy.to(inner)
    z = torch.zeros_like(x) if gate is None else gate.to(inner)
    s = torch.sigmoid(z)
    act, slope = (torch.ones_like(x), z) if gate is None else (z * s, s * (1 + z * (1 - s)))
    v = x if norm_first else x * act
    v_G = v.unflatten(-1, (groups, -1))
    scale_G = torch.rsqrt(v_G.square().mean(-1, keepdim=True) + eps)
    n = (v_G * scale_G).flatten(-2)
    outer = dy * act if norm_first else dy
    dn_G, n_G = (outer * weight).unflatten(-1, (groups, -1)), n.unflatten(-1, (groups, -1))
    dv = (scale_G * (dn_G - n_G * (dn_G * n_G).mean(-1, keepdim=True))).flatten(-2)
    d_weight = (outer * n).flatten(0, -2).sum(0)
    if gate is None:
        return dv, x.new_empty(0), d_weight
    if norm_first:
        return dv, dy * n * weight * slope, d_weight
    return dv * act, dv * x * slope, d_weight
