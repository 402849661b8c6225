"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a linear recurrence with a matrix state per head, short convolution, gated norm.

Parameter shapes are those of transformers' Mamba2. Legend: B batch, T time, H heads, P head width, G groups, N state width, I inner width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import decode_step
from kernels.joint import columns
from kernels.linear import linear
from kernels.mamba2_step import mamba2_step
from kernels.short_conv import joint_gradient
from kernels.ssd import border, ssd
from kernels.step_sizes import step_sizes
from models.contract import Role
from models.convolved import ConvolvedMixer
from models.init import draw_step_sizes_, init_matrix, norm_eps_problems, step_size_problems, tag
from models.layers import CausalConv, RMSNorm
from models.segments import document_starts, last_segment
from models.slices import Slice, untraced


@dataclass
class Config:
    d_state: int = 128  # N
    expand: int = 2  # inner width / d_model
    head_dim: int = 64  # P
    n_groups: int = 1  # heads that share B and C
    d_conv: int = 4  # width of the short convolution
    chunk: int = 256  # steps solved by matrix products at once
    dt_min: float = 0.001  # initial step sizes, log-uniform
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_limit_min: float = 0.0  # step sizes are clamped to these at all times; dt_limit_max 0: no upper limit
    dt_limit_max: float = 0.0
    norm_eps: float = 1e-5

    def problems(self, d_model: int) -> list[str]:
        if min(self.d_state, self.expand, self.head_dim, self.n_groups, self.chunk) < 1 or self.d_conv < 2:
            return ["d_state, expand, head_dim, n_groups and chunk must be above zero and d_conv above one."]
        problems, inner = [], self.expand * d_model
        if inner % self.head_dim:
            problems.append(f"expand x d_model = {inner} is not divisible by head_dim {self.head_dim}.")
        elif inner // self.head_dim % self.n_groups:
            problems.append(f"the {inner // self.head_dim} heads are not divisible by n_groups {self.n_groups}.")
        problems += step_size_problems(self.dt_min, self.dt_max, self.dt_floor)
        problems += norm_eps_problems(self.norm_eps)
        if self.dt_limit_min < 0 or self.dt_limit_max and self.dt_limit_max <= self.dt_limit_min:
            problems.append(f"dt_limit_min {self.dt_limit_min} must be zero or more and below dt_limit_max {self.dt_limit_max}.")
        return problems


@dataclass
class State:
    """The last convolution inputs, the matrix states in fp32, and the segment of the last token (-1: none yet). in_place: a decoding step
    writes over the matrix states."""

    conv_BWI: Tensor
    ssm_BHPN: Tensor
    segment_B: Tensor
    in_place: bool = False


class Mixer(ConvolvedMixer):
    recurrence = "ssd"

    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.inner = config.expand * d_model
        self.H = self.inner // config.head_dim
        self.BC = config.n_groups * config.d_state
        self.in_proj = nn.Linear(d_model, 2 * self.inner + 2 * self.BC + self.H, bias=False)
        tag(self.in_proj.weight, splits=[self.inner, self.inner, *[config.d_state] * (2 * config.n_groups), self.H])  # z, x, B, C, dt
        self.conv = CausalConv(self.inner + 2 * self.BC, config.d_conv)
        self.dt_bias = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32")
        self.A_log = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32", "log_decay_rate")
        self.D = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32")
        self.norm = RMSNorm(self.inner, config.norm_eps, config.n_groups)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        """Published initialisation: A in -[1, 16], step sizes log-uniform in [dt_min, dt_max] through the inverse of softplus."""
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        self.conv.init_weights()
        self.norm.init_weights()
        draw_step_sizes_(self.dt_bias, self.config.dt_min, self.config.dt_max, self.config.dt_floor)
        with torch.no_grad():
            self.A_log.copy_(torch.log(torch.rand(self.H) * 15 + 1))
            self.D.fill_(1.0)

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "ssm_BHPN": "recurrent", "segment_B": "bookkeeping"}

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        if state is not None and self.decodes(x_BTD):
            return self._decode(projected, state, segment_ids)
        starts, past = self.before(projected, self.inner, state, segment_ids)
        joint = joint_gradient(projected)
        z, xBC, dt, conv_state = self.conv(projected, self.inner, past, starts, joint)
        x, B_, C_ = columns(xBC, [self.inner, self.BC, self.BC])
        groups = (self.config.n_groups, self.config.d_state)
        x_BTHP = x.unflatten(-1, (self.H, self.config.head_dim))
        inner = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        dt_BTH = step_sizes(dt, self.dt_bias, self.config.dt_limit_min, self.config.dt_limit_max or math.inf)
        A_H = -torch.exp(self.A_log.to(inner))
        h0 = state.ssm_BHPN if state is not None else None
        B_BTGN, C_BTGN = B_.unflatten(-1, groups), C_.unflatten(-1, groups)
        D_H = self.D.to(inner)
        if self.slice is not None and state is None:
            y_BTHP = self.over_ranks(self.slice, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, starts)
        else:
            y_BTHP, ssm = ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0, starts, chunk=self.config.chunk, D_H=D_H)
        y = linear(self.norm(y_BTHP.flatten(2), gate=z, dtype=x_BTHP.dtype, columns=(0, joint)), self.out_proj)
        return y, None if state is None else State(conv_state, ssm, last_segment(segment_ids, state.segment_B))

    @untraced
    def over_ranks(
        self,
        slice_: Slice,
        x_BTHP: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        B_BTGN: Tensor,
        C_BTGN: Tensor,
        D_H: Tensor,
        starts: Tensor | None,
    ) -> Tensor:
        """The scan's outputs (B, T, H, P) on a slice of time. What the slice ends in from an empty state comes from one matrix product, so
        that the scan runs once, with the right start."""
        with torch.autocast(x_BTHP.device.type, enabled=False):
            with torch.no_grad():
                end, through = border.end_state(x_BTHP, dt_BTH, A_H, B_BTGN, starts)
                ends, throughs = slice_.gather_two(end, through, "states")
                h0 = torch.zeros_like(end)
                for n in range(slice_.rank):
                    h0 = ends[n] + _decayed(throughs[n], h0)
            y, final = ssd(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0, starts, chunk=self.config.chunk, D_H=D_H)
            return slice_.with_adjoint_from_right(y, final, border.start_adjoint, _decayed, dt_BTH, A_H, C_BTGN, starts)

    def _decode(self, projected_B1E: Tensor, state: State, segment_ids: Tensor | None) -> tuple[Tensor, State]:
        starts, c = document_starts(segment_ids, state.segment_B), self.config
        y_BI, conv, ssm = mamba2_step(
            projected_B1E[:, 0], state.conv_BWI, self.conv.weight, self.conv.bias, self.dt_bias, self.A_log, self.D, state.ssm_BHPN,
            None if starts is None else starts[:, 0], c.n_groups, c.dt_limit_min, c.dt_limit_max or math.inf, in_place=state.in_place,
        )  # fmt: skip
        y = self.out_proj(self.norm(y_BI[:, None], gate=projected_B1E[..., : self.inner], dtype=y_BI.dtype))
        return y, State(conv, ssm, last_segment(segment_ids, state.segment_B), state.in_place)

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: State) -> Callable[[], None] | None:
        c = self.config
        if self.norm.groups > 1:  # the kernel's norm is over the whole row
            return None
        inner = self.inner
        row_BI = x_BD.new_empty(x_BD.shape[0], self.in_proj.out_features)
        y_BI = x_BD.new_empty(x_BD.shape[0], inner)
        conv = decode_step.Convolution(inner, self.conv.weight, self.conv.bias, state.conv_BWI)
        z, x, B_, C_, dt = row_BI.split([inner, inner, self.BC, self.BC, self.H], -1)
        rates = (self.dt_bias.detach().float(), self.A_log.detach().float(), self.D.detach().float())
        state.segment_B.clamp_(min=0)  # as last_segment does
        gain = norm.gain.detach()

        def step() -> None:
            decode_step.project(x_BD, self.in_proj.weight, row_BI, norm_K=gain, eps=norm.eps, conv=conv, silu=(0, inner))
            decode_step.ssm(x, B_, C_, dt, *rates, state.ssm_BHPN, y_BI, c.n_groups, c.dt_limit_min, c.dt_limit_max or math.inf)
            out = self.out_proj.weight
            decode_step.project(
                y_BI, out, x_BD, norm_K=self.norm.weight, eps=self.norm.eps, gate_BK=z, gate_first=True, add=True, keep_N=keep_D
            )

        return step

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        return State(*self.conv.with_memory(batch, (self.H, self.config.head_dim, self.config.d_state), device, dtype))

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.conv.bytes_with(self.inner * self.config.d_state, batch, dtype)

    def flops_per_token(self, T: int) -> int:
        """Projections, convolution, and the recurrence counted as a recurrence (update and read: 3 multiply-adds per state element)."""
        projections = 2 * self.d_model * (2 * self.inner + 2 * self.BC + self.H) + 2 * self.inner * self.d_model
        return projections + 2 * self.config.d_conv * (self.inner + 2 * self.BC) + 6 * self.inner * self.config.d_state


def _decayed(decay_BH: Tensor, state_BHPN: Tensor) -> Tensor:
    """decay times state. Nothing comes through a decay of zero, as where a document starts, not even what is not a number."""
    decay = decay_BH[..., None, None]
    return torch.where(decay == 0, torch.zeros_like(state_BHPN), decay * state_BHPN)
