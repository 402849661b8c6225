"""Layers that mixers share: norms, the gated MLP, and the short causal convolution with its state.

Legend: B batch, T time, D width, W kernel width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels import decode_step
from kernels.add_norm import add_norm, norm_beside
from kernels.embedding import embedding
from kernels.gated_norm import gated_norm
from kernels.linear import linear, linears, product_dtype
from kernels.short_conv import last_inputs, short_conv_columns
from kernels.swiglu import swiglu
from models.init import Module, init_matrix, normal_, tag


class RMSNorm(Module):
    """x / rms(x) * gain over groups of the last dimension, in fp32 inside. The gain is the weight, or 1 + weight if `centred`, so that a weight
    in bf16 keeps small changes of it."""

    def __init__(self, dim: int, eps: float = 1e-5, groups: int = 1, centred: bool = False) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.full((dim,), 0.0 if centred else 1.0)), "no_decay")
        self.eps, self.groups, self.centred = eps, groups, centred

    @property
    def gain(self) -> Tensor:
        """What x / rms(x) is multiplied by: the weight itself, or 1 + weight in fp32 (fp64)."""
        if not self.centred:
            return self.weight
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) + 1

    def forward(
        self,
        x: Tensor,
        gate: Tensor | None = None,
        *,
        norm_first: bool = False,
        dtype: torch.dtype | None = None,
        columns: tuple[int, Any] = (0, None),
        owed: tuple[Tensor, Tensor | None] | None = None,
        beside: bool = False,
        heads: int = 1,
    ) -> Any:
        """Normalises x, or x * silu(gate) as Mamba-2 does; with `norm_first` the gate comes after. In `dtype`, by default that in which
        matrix products take x.

        owed: (added, scale or None) of `after`, whose two results are returned. beside: returns x too, to be read in the place of the one given.
        heads: so many rows of the last dimension side by side, each by itself.
        columns (first, joint): the gate is columns, from `first` on, of the projection that a `CausalConv` splits, given the same `joint_gradient`.
        """
        if owed is not None:
            return self.after(x, *owed)
        if beside:
            return norm_beside(x, self.gain, self.eps, product_dtype(x))
        gain = self.gain if heads == 1 else self.gain.repeat(heads)
        return gated_norm(x, gate, gain, self.eps, self.groups * heads, norm_first, dtype or product_dtype(x), columns=columns)

    def after(self, x: Tensor, added: Tensor, scale_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(r, the norm of r) with r = x scale + added, or x + added: the residual stream after a sublayer, and what the next one reads."""
        return add_norm(x, added, scale_D, self.gain, self.eps, product_dtype(x))

    def init_weights(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.centred else 1.0)


class Embedding(nn.Embedding):
    """torch's, whose gradient on a GPU is a kernel of ours."""

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(self.weight, ids)


class SwiGLU(Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), and what every channel mixer (models/channel) is: other maps in its place override `gate_and_up`
    and `out`, which have to be all that it computes."""

    one_last_product: ClassVar[bool] = True  # `out` is a single product, so that nobody misses its output where it is computed again

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate: Any = nn.Linear(d_model, d_ff, bias=False)
        self.up: Any = nn.Linear(d_model, d_ff, bias=False)
        self.down: Any = nn.Linear(d_ff, d_model, bias=False)
        tag(self.down.weight, residual=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.out(self.inner(x_BTD))

    def inner(self, x_BTD: Tensor) -> Tensor:
        """What `out` takes, (B, T, F)."""
        return swiglu(*self.gate_and_up(x_BTD))

    def gate_and_up(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """The two that are multiplied, (B, T, F) each, the first after its silu."""
        return linears(x_BTD, self.gate, self.up)

    def out(self, inner_BTF: Tensor) -> Tensor:
        return linear(inner_BTF, self.down)

    def init_weights(self, std: float, n_layers: int) -> None:
        for layer in (self.gate, self.up, self.down):
            init_matrix(layer.weight, std, n_layers)

    def flops_per_token(self) -> int:
        return 6 * self.gate.in_features * self.gate.out_features

    def inner_flops_per_token(self) -> int:
        """Of these, those before the last map."""
        return 2 * self.flops_per_token() // 3

    def plain_weights(self) -> dict[str, Tensor]:
        """The weights of a SwiGLU of dense maps that computes the same: what an export holds."""
        return {f"{name}.weight": getattr(self, name).weight.detach() for name in ("gate", "up", "down")}

    def follow(self, share: float) -> bool:
        """Called before each training step with the share of the run that is behind it. True: from now on passes are made of other operations."""
        return False

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None) -> Callable[[], None] | None:
        """What takes x <- keep x + self(norm(x)) over one token in two kernels, writing over x (fp32); None: there is no such form."""
        inner_BF = x_BD.new_empty(x_BD.shape[0], self.gate.out_features)

        def step() -> None:
            decode_step.project(x_BD, self.gate.weight, inner_BF, norm_K=norm.gain.detach(), eps=norm.eps, pair_NK=self.up.weight)
            decode_step.project(inner_BF, self.down.weight, x_BD, add=True, keep_N=keep_D)

        return step


class CausalConv(Module):
    """Depthwise causal convolution of width W over (B, T, D) and SiLU, its state the last W-1 inputs; it never reaches over a document start."""

    def __init__(self, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = tag(nn.Parameter(torch.empty(channels, width)), "no_decay")
        self.bias: Any = tag(nn.Parameter(torch.empty(channels)), "no_decay") if bias else None
        self.channels, self.width = channels, width  # ZeRO-3 divides the weight over the ranks, and its shape with it, between passes

    def init_weights(self) -> None:
        bound = self.width**-0.5
        normal_(self.weight, bound / 3**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_state(self, batch: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        return torch.zeros(batch, self.width - 1, self.channels, device=device, dtype=dtype)

    def with_memory(
        self, batch: int, memory: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of the empty state of a mixer that remembers more than this convolution's inputs: those in `dtype` (None: the weight's), zeros of
        shape (batch, *memory) in fp32 (fp64), and the segment of the last token (-1: none yet)."""
        kind = dtype or self.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32
        zeros = torch.zeros(batch, *memory, device=device, dtype=inner)
        return self.init_state(batch, device, kind), zeros, torch.full((batch,), -1, device=device, dtype=torch.int32)

    def bytes_with(self, numbers: int, batch: int, dtype: torch.dtype) -> int:
        """Bytes of that state without the segment, its memory of so many numbers a row in fp32."""
        return batch * ((self.width - 1) * self.channels * dtype.itemsize + 4 * numbers)

    def why_not_split(self, T: int) -> str:
        """Why slices of T tokens are too short to lie on different ranks, or ''."""
        return "" if T >= self.width - 1 else f"slices of {T} token(s) are shorter than the {self.width - 1} a convolution looks back"

    def forward(
        self, x_BTC: Tensor, first: int, state_BWD: Tensor | None, starts_BT: Tensor | None, joint: Any = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Splits a projection of C columns: those before `first`, the D from there convolved, those after, and the new state (None if
        none was given): the last W-1 inputs, zeroed where they belong to an earlier document. joint: `kernels.short_conv.joint_gradient` of the
        projection, if a norm takes some of its columns as a gate."""
        past = None if state_BWD is None else state_BWD.to(x_BTC.dtype)
        bias = self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias
        before, y, after = short_conv_columns(x_BTC, first, past, self.weight, bias, starts_BT, True, joint)
        if past is None:
            return before, y, after, None
        return before, y, after, last_inputs(x_BTC[..., first : first + self.weight.shape[0]], past, self.width, starts_BT)
