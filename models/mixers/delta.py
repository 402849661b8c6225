"""The delta rule: Gated DeltaNet (arXiv 2412.06464), DeltaNet (2406.06484) and DeltaProduct (2502.10297), a matrix state per head whose every update
takes out what it held under a key before it writes there. Short convolutions on queries, keys and values, a gated norm on the outputs.

Legend: B batch, T time, S updates (n a token), H heads of values, G heads of queries and keys, K key width, V value width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import decode_step
from kernels.delta_rule import border, delta_rule
from kernels.delta_step import delta_step
from kernels.delta_step.op import launch as launch_step
from kernels.delta_step.op import usable
from kernels.joint import columns
from kernels.linear import linear
from kernels.short_conv import joint_gradient
from models.contract import Role
from models.convolved import ConvolvedMixer
from models.init import draw_step_sizes_, init_matrix, norm_eps_problems, step_size_problems, tag, value_width_problems
from models.layers import CausalConv, RMSNorm
from models.segments import document_starts, last_segment
from models.slices import Slice, untraced


@dataclass
class Config:
    n_heads: int = 4  # heads of values, each with a state
    n_k_heads: int = 0  # heads of queries and keys; 0: as many
    head_dim: int = 0  # width of a query and key; 0: d_model / n_heads
    expand_v: float = 1.0  # width of a head's values / head_dim
    updates: int = 1  # of the state a token, each with its own key and value (DeltaProduct's n_h)
    negative: bool = False  # strengths to 2 instead of 1: eigenvalues of an update from -1 instead of 0
    gate: bool = True  # forget by a gate
    output_gate: bool = True  # a SiLU gate behind the norm of the outputs
    d_conv: int = 4  # width of the short convolution
    dt_min: float = 0.001  # initial step sizes of the gate, log-uniform
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    norm_eps: float = 1e-5

    def problems(self, d_model: int) -> list[str]:
        if self.n_heads < 1 or min(self.n_k_heads, self.head_dim) < 0 or self.d_conv < 2 or not 1 <= self.updates <= 16:
            return ["n_heads must be above zero, n_k_heads and head_dim zero or more, d_conv above one and updates between 1 and 16."]
        problems = []
        if self.n_heads % (self.n_k_heads or self.n_heads):
            problems.append(f"n_heads {self.n_heads} is not divisible by n_k_heads {self.n_k_heads}.")
        if not self.head_dim and d_model % self.n_heads:
            problems.append(f"d_model {d_model} is not divisible by n_heads {self.n_heads}; change one or set head_dim.")
        else:
            problems += value_width_problems(self.expand_v, self.head_dim or d_model // self.n_heads)
        problems += step_size_problems(self.dt_min, self.dt_max, self.dt_floor)
        problems += norm_eps_problems(self.norm_eps)
        return problems


@dataclass
class State:
    """The last convolution inputs, the matrix states in fp32, and the segment of the last token (-1: none yet). in_place: a decoding step
    writes over the matrix states."""

    conv_BWI: Tensor
    delta_BHVK: Tensor
    segment_B: Tensor
    in_place: bool = False


class Mixer(ConvolvedMixer):
    recurrence = "delta_rule"

    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.n, self.H, self.G = config.updates, config.n_heads, config.n_k_heads or config.n_heads
        self.K = config.head_dim or d_model // config.n_heads
        self.V = round(config.expand_v * self.K)
        self.keys, self.values = self.G * self.K, self.H * self.V
        self._strength = 2.0 if config.negative else 1.0  # the largest
        self.first = self.values if config.output_gate else 0  # columns of the output gate
        self.convolved = self.keys + self.n * (self.keys + self.values)
        after = self.n * self.H + (self.H if config.gate else 0)
        self.in_proj = nn.Linear(d_model, self.first + self.convolved + after, bias=False)
        gate, strengths = [self.values] * config.output_gate, [self.n * self.H] + [self.H] * config.gate
        tag(self.in_proj.weight, splits=[*gate, self.keys, *[self.keys] * self.n, *[self.values] * self.n, *strengths])
        self.conv = CausalConv(self.convolved, config.d_conv, bias=False)
        if config.gate:
            self.dt_bias = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32")
            self.A_log = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32", "log_decay_rate")
        self.norm = RMSNorm(self.V, config.norm_eps)
        self.out_proj = nn.Linear(self.values, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        """Published initialisation: A in (0, 16], step sizes log-uniform in [dt_min, dt_max] through the inverse of softplus."""
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        self.conv.init_weights()
        self.norm.init_weights()
        if not self.config.gate:
            return
        draw_step_sizes_(self.dt_bias, self.config.dt_min, self.config.dt_max, self.config.dt_floor)
        with torch.no_grad():
            self.A_log.copy_(torch.log((torch.rand(self.H) * 16).clamp(min=1e-3)))

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "delta_BHVK": "recurrent", "segment_B": "bookkeeping"}

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        if state is not None and self.decodes(x_BTD):
            return self._decode(projected, state, segment_ids)
        starts, past = self.before(projected, self.first, state, segment_ids)
        joint = joint_gradient(projected)
        z, qkv, after, conv_state = self.conv(projected, self.first, past, starts, joint)
        q, k, v = columns(qkv, [self.keys, self.n * self.keys, self.n * self.values])
        q_BTGK, k_BSGK = q.unflatten(-1, (self.G, self.K)), self._updates(k, self.G, self.K)
        v_BSHV, (beta_BSH, g_BTH) = self._updates(v, self.H, self.V), self._strengths(after)
        if self.slice is not None and state is None:
            o_BTHV = self.over_ranks(self.slice, q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, starts)
        else:
            h0 = state.delta_BHVK if state is not None else None
            o_BTHV, delta = delta_rule(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0, starts, normalize=True, scale=self.K**-0.5)
        y = linear(self._normed(o_BTHV.flatten(2), z, joint), self.out_proj)
        return y, None if state is None else State(conv_state, delta, last_segment(segment_ids, state.segment_B))

    def _decode(self, projected_B1E: Tensor, state: State, segment_ids: Tensor | None) -> tuple[Tensor, State]:
        starts, gated = document_starts(segment_ids, state.segment_B), self.config.gate
        o_BI, conv, delta = delta_step(
            projected_B1E[:, 0], state.conv_BWI, self.conv.weight, self.dt_bias if gated else None, self.A_log if gated else None,
            state.delta_BHVK, None if starts is None else starts[:, 0], self.G, self.n, self._strength, self.K**-0.5, state.in_place,
        )  # fmt: skip
        y = linear(self._normed(o_BI[:, None], projected_B1E[..., : self.first], None), self.out_proj)
        return y, State(conv, delta, last_segment(segment_ids, state.segment_B), state.in_place)

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: State) -> Callable[[], None] | None:
        if not usable(x_BD.device):
            return None
        B, C, gain = x_BD.shape[0], self.convolved, norm.gain.detach()
        row_BE, o_BI = x_BD.new_empty(B, self.in_proj.out_features), x_BD.new_empty(B, self.values)
        conv = decode_step.Convolution(self.first, self.conv.weight, self.conv.weight.new_zeros(C), state.conv_BWI)
        dt_bias, A_log = (self.dt_bias.detach().float(), self.A_log.detach().float()) if self.config.gate else (None, None)
        gate, sizes, delta = row_BE[:, : self.first], (self.G, self.n, C), state.delta_BHVK
        state.segment_B.clamp_(min=0)  # as last_segment does

        def step() -> None:
            decode_step.project(x_BD, self.in_proj.weight, row_BE, norm_K=gain, eps=norm.eps, conv=conv)
            rows = row_BE[:, self.first :]
            launch_step(rows, None, None, dt_bias, A_log, delta, None, o_BI, None, delta, sizes, self._strength, self.K**-0.5, chained=True)
            decode_step.project(self._normed(o_BI, gate, None), self.out_proj.weight, x_BD, add=True, keep_N=keep_D)

        return step

    def _updates(self, x_BTI: Tensor, heads: int, width: int) -> Tensor:
        """(B, S, heads, width), of S = n T updates, those of a token one after the other; without a copy for one a token."""
        if self.n == 1:
            return x_BTI.unflatten(-1, (heads, width))
        return x_BTI.unflatten(-1, (self.n, heads, width)).flatten(1, 2)

    def _strengths(self, after_BTE: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b of every update, log gates or None) in fp32 (fp64)."""
        inner = torch.float64 if after_BTE.dtype == torch.float64 else torch.float32
        beta, a = after_BTE.to(inner).split([self.n * self.H, after_BTE.shape[-1] - self.n * self.H], -1)
        beta_BSH = self._strength * torch.sigmoid(beta).unflatten(-1, (self.n, self.H)).flatten(1, 2)
        if not self.config.gate:
            return beta_BSH, None
        return beta_BSH, -torch.exp(self.A_log.to(inner)) * F.softplus(a + self.dt_bias.to(inner))

    def _normed(self, o_BTI: Tensor, z_BTI: Tensor, joint: Any) -> Tensor:
        """RMSNorm of every head, with one weight for all of them, and the gate behind it."""
        gated = self.config.output_gate
        normed: Tensor = self.norm(
            o_BTI, z_BTI if gated else None, heads=self.H, norm_first=True, dtype=o_BTI.dtype, columns=(0, joint if gated else None)
        )
        return normed

    @untraced
    def over_ranks(
        self, slice_: Slice, q_BTGK: Tensor, k_BSGK: Tensor, v_BSHV: Tensor, beta_BSH: Tensor, g_BTH: Tensor | None, starts: Tensor | None
    ) -> Tensor:
        """The outputs (B, T, H, V) on a slice of time. Each rank passes on what its slice ends in from an empty state, and the product that the
        state before it is multiplied by; then the recurrence runs with the right start."""
        options = {"normalize": True, "scale": self.K**-0.5}
        with torch.autocast(q_BTGK.device.type, enabled=False):
            with torch.no_grad():
                end, through = border.end_state(k_BSGK, v_BSHV, beta_BSH, g_BTH, starts, True, self.n)
                ends, throughs = slice_.gather_two(end, through, "states")
                h0 = torch.zeros_like(end)
                for n in range(slice_.rank):
                    h0 = ends[n] + border.reached(throughs[n], h0)
            o, final = delta_rule(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0, starts, normalize=True, scale=self.K**-0.5)
            local = functools.partial(border.start_adjoint, **options)
            return slice_.with_adjoint_from_right(o, final, local, border.reached_back, q_BTGK, k_BSGK, beta_BSH, g_BTH, starts, through)

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        return State(*self.conv.with_memory(batch, (self.H, self.V, self.K), device, dtype))

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.conv.bytes_with(self.values * self.K, batch, dtype)

    def flops_per_token(self, T: int) -> int:
        """Projections, convolution, and the recurrence counted as a recurrence (each update reads and writes the state, the output reads it)."""
        projections = 2 * self.in_proj.in_features * self.in_proj.out_features + 2 * self.values * self.d_model
        return projections + 2 * self.config.d_conv * self.convolved + (4 * self.n + 2) * self.values * self.K
