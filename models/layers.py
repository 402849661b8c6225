"""Layers that mixers share: norms, the gated MLP, rotary positions, and the short causal convolution with its state.

Legend: B batch, T time, D width, H heads, K head width, W kernel width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.init import init_matrix, normal_, tag


class RMSNorm(nn.Module):
    """x / rms(x) * weight over groups of the last dimension, in fp32 inside."""

    def __init__(self, dim: int, eps: float = 1e-5, groups: int = 1) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.ones(dim)), "no_decay")
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalises x, or x * silu(gate) as Mamba-2 does."""
        inner = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = x.to(inner)
        if gate is not None:
            y = y * F.silu(gate.to(inner))
        grouped = y.unflatten(-1, (self.groups, -1))
        grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped.flatten(-2) * self.weight.to(inner)).to(x.dtype)

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)
        tag(self.down.weight, residual=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))

    def init_weights(self, std: float, n_layers: int) -> None:
        for layer in (self.gate, self.up, self.down):
            init_matrix(layer.weight, std, n_layers)

    def flops_per_token(self) -> int:
        return 6 * self.gate.in_features * self.gate.out_features


def rotate(x_BHTK: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in the half-split layout of Llama; angles in fp32."""
    K = x_BHTK.shape[-1]
    inner = torch.float64 if x_BHTK.dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(0, K, 2, device=x_BHTK.device, dtype=inner) / K)
    angle = positions_T.to(inner)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x_BHTK.to(inner).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_BHTK.dtype)


class _SegmentedConv(torch.autograd.Function):
    """The convolution where documents are packed: keeps its input only and masks again in the backward pass; sums in fp32.

    padded (B, W-1+T, D), weight (D, W), bias (D,), document (B, W-1+T): which document each input belongs to.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight_DW: Tensor, bias_D: Tensor, document: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight_DW, document)
        history = weight_DW.shape[1] - 1
        T = padded.shape[1] - history
        y = padded[:, history:] * weight_DW[:, history] + bias_D
        for w in range(history):
            same = document[:, w : w + T] == document[:, history:]
            y += padded[:, w : w + T] * same[..., None] * weight_DW[:, w]
        return y.to(padded.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        padded, weight_DW, document = ctx.saved_tensors
        dy = gradients[0].to(weight_DW.dtype)
        history, T = weight_DW.shape[1] - 1, dy.shape[1]
        d_padded, d_weight = torch.zeros_like(padded, dtype=dy.dtype), torch.empty_like(weight_DW)
        for w in range(history + 1):
            masked = dy * (document[:, w : w + T] == document[:, history:])[..., None]
            d_padded[:, w : w + T] += masked * weight_DW[:, w]
            d_weight[:, w] = (masked * padded[:, w : w + T]).sum((0, 1))
        return d_padded.to(padded.dtype), d_weight, dy.sum((0, 1)), None


class CausalConv(nn.Module):
    """Depthwise causal convolution of width W over (B, T, D), its state the last W-1 inputs; it never reaches over a document start."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(channels, width)), "no_decay")
        self.bias = tag(nn.Parameter(torch.empty(channels)), "no_decay")
        self.width = width

    def init_weights(self) -> None:
        bound = self.width**-0.5
        normal_(self.weight, bound / 3**0.5)
        nn.init.zeros_(self.bias)

    def init_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        return torch.zeros(batch, self.width - 1, self.weight.shape[0], device=device, dtype=dtype)

    def why_whole(self, T: int) -> str:
        """Why slices of T tokens are too short to lie on different ranks, or ''."""
        return "" if T >= self.width - 1 else f"slices of {T} token(s) are shorter than the {self.width - 1} a convolution looks back"

    def forward(self, x_BTD: Tensor, state_BWD: Tensor | None, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """(convolved x, the last W-1 inputs, zeroed where they belong to an earlier document)."""
        B, T, D = x_BTD.shape
        history = self.width - 1
        past = x_BTD.new_zeros(B, history, D) if state_BWD is None else state_BWD.to(x_BTD.dtype)
        padded = torch.cat([past, x_BTD], 1)
        if starts_BT is None and T == 1 and not torch.is_grad_enabled():  # decoding: a product is cheaper than a convolution's setting up
            inner = torch.promote_types(x_BTD.dtype, torch.float32)
            y = (padded.to(inner) * self.weight.to(inner).T).sum(1, keepdim=True) + self.bias.to(inner)
            return y.to(x_BTD.dtype), padded[:, 1:]
        if starts_BT is None:
            weight, bias = self.weight.to(x_BTD.dtype), self.bias.to(x_BTD.dtype)
            y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=D).transpose(1, 2)
            return y, padded[:, T:]
        document = F.pad(starts_BT.int().cumsum(1), (history, 0))  # carried inputs belong to document 0
        inner = torch.promote_types(x_BTD.dtype, torch.float32)
        with torch.autocast(x_BTD.device.type, enabled=False):
            y = _SegmentedConv.apply(padded, self.weight.to(inner), self.bias.to(inner), document)
        keep = document[:, T:] == document[:, -1:]
        return y, padded[:, T:] * keep[..., None]
