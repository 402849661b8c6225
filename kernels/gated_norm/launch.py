"""Launches the kernels of the gated RMSNorm; imports Triton, so it is imported when a kernel is first wanted.

Legend: B batch, T time, D width, G groups, K = D / G channels of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_norm import triton as kernels
from kernels.parts import runs, summed

PER_WARP, PER_WARP_BACK = 512, 256  # channels of a warp


def rows(x: Tensor) -> Tensor:
    """x (..., D) as (B, T, D) with free strides over B and T; copied only where that cannot be."""
    x = x.reshape(1, -1, x.shape[-1]) if x.ndim < 3 else x if x.ndim == 3 else x.reshape(-1, *x.shape[-2:])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tile(K: int, device: torch.device, per_warp: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program."""
    BK = 1 << (K - 1).bit_length()
    BR = 2 if device.type == "cpu" else max(1, 1024 // BK)
    return BR, BK, min(16, max(1, BR * BK // per_warp))


def norm(h: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, norm_first: bool, dtype: torch.dtype) -> Tensor:
    """y, contiguous, shaped as h, in `dtype`."""
    x, weight = rows(h), weight.contiguous()
    z = x if gate is None else rows(gate)
    (B, T, _), K = x.shape, x.shape[2] // groups
    BR, BK, warps = tile(K, x.device, PER_WARP)
    y = torch.empty(h.shape, dtype=dtype, device=h.device)
    kernels.forward[(-(-B * T // BR), groups)](
        x, z, weight, y, B * T, T, K, eps, x.stride(0), x.stride(1), z.stride(0), z.stride(1),
        G=groups, HAS_GATE=gate is not None, NORM_FIRST=norm_first, BR=BR, BK=BK, num_warps=warps,
    )  # fmt: skip
    return y


def norm_backward(
    dy: Tensor, h: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int, norm_first: bool,
    d_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of h, gate (written into `d_gate` if given: free strides, channels neighbours) and weight."""
    x, g, weight = rows(h), rows(dy), weight.contiguous()
    z = x if gate is None else rows(gate)
    (B, T, D), K = x.shape, x.shape[2] // groups
    BR, BK, warps = tile(K, x.device, PER_WARP_BACK)
    N = B * T
    each, programs = runs(N, BR)
    dh = torch.empty(B, T, D, dtype=h.dtype, device=h.device)
    if gate is not None and d_gate is None:
        d_gate = torch.empty(z.shape, dtype=gate.dtype, device=gate.device)
    assert d_gate is None or d_gate.ndim == 3
    e = dh if d_gate is None else d_gate
    partial = torch.empty(programs, D, dtype=torch.float32, device=h.device)
    kernels.backward[(programs, groups)](
        g, x, z, weight, dh, e, partial, N, T, K, each, eps, g.stride(0), g.stride(1), x.stride(0), x.stride(1), z.stride(0), z.stride(1),
        dh.stride(0), dh.stride(1), e.stride(0), e.stride(1),
        G=groups, HAS_GATE=gate is not None, NORM_FIRST=norm_first, BR=BR, BK=BK, num_warps=warps,
    )  # fmt: skip
    return dh.view(h.shape), None if gate is None else e.reshape(gate.shape), summed(partial).to(weight.dtype)
