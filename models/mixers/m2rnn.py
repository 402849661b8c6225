"""M2RNN (arXiv 2603.14360): a matrix state per head that passes through a tanh and a weight of its own at every step, and so can follow what linear
recurrences cannot. Short convolutions on queries, keys and values, a skip, a gate and a norm on the outputs.

Legend: B batch, T time, H heads of values, G heads of queries and keys, K key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import linear
from kernels.m2rnn import m2rnn
from kernels.m2rnn_step import m2rnn_step
from kernels.short_conv import joint_gradient
from models.contract import Role, document_starts, last_segment
from models.convolved import ConvolvedMixer
from models.init import draw_step_sizes_, init_matrix, norm_eps_problems, step_size_problems, tag, value_width_problems
from models.layers import CausalConv, RMSNorm
from models.slices import Slice, untraced

TRACKER_KEEP, TRACKER_INPUT = (
    0.05,
    1.5,
)  # forget gates at an input of zero, and the convolution's weight of the current token, of a tracker's start


@dataclass
class Config:
    n_heads: int = 0  # heads of values, each with a state; 0: one for every 64 channels
    n_k_heads: int = 0  # heads of queries and keys; 0: as many
    head_dim: int = 0  # width of a query and key; 0: d_model / n_heads
    expand_v: float = 1.0  # width of a head's values / head_dim
    d_conv: int = 4  # width of the short convolution
    dt_min: float = 0.001  # initial step sizes of the forget gate, log-uniform
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    norm_eps: float = 1e-5
    start: str = "published"  # or "tracker": weights that follow what an order of inputs does to a state, not a sum of them

    def heads(self, d_model: int) -> int:
        return self.n_heads or max(1, d_model // 64)

    def problems(self, d_model: int) -> list[str]:
        if min(self.n_heads, self.n_k_heads, self.head_dim) < 0 or self.d_conv < 2:
            return ["n_heads, n_k_heads and head_dim must be zero or more, and d_conv above one."]
        problems, heads = [], self.heads(d_model)
        if heads % (self.n_k_heads or heads):
            problems.append(f"{heads} heads are not divisible by n_k_heads {self.n_k_heads}.")
        if not self.head_dim and d_model % heads:
            problems.append(f"d_model {d_model} is not divisible by {heads} heads; change n_heads or set head_dim.")
        else:
            problems += value_width_problems(self.expand_v, self.head_dim or d_model // heads)
        problems += step_size_problems(self.dt_min, self.dt_max, self.dt_floor)
        if self.start not in ("published", "tracker"):
            problems.append(f"start must be published or tracker, not {self.start!r}.")
        problems += norm_eps_problems(self.norm_eps)
        return problems


@dataclass
class State:
    """The last convolution inputs, the matrix states in fp32, and the segment of the last token (-1: none yet). in_place: a decoding step
    writes over the matrix states."""

    conv_BWI: Tensor
    m2rnn_BHKV: Tensor
    segment_B: Tensor
    in_place: bool = False


class Mixer(ConvolvedMixer):
    recurrence = "m2rnn"

    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.H = config.heads(d_model)
        self.G = config.n_k_heads or self.H
        self.K = config.head_dim or d_model // self.H
        self.V = round(config.expand_v * self.K)
        self.keys, self.values = self.G * self.K, self.H * self.V
        self.convolved = 2 * self.keys + self.values
        self.in_proj = nn.Linear(d_model, self.values + self.convolved + self.H, bias=False)  # output gate, q, k and v, forget gate
        tag(self.in_proj.weight, splits=[self.values, self.keys, self.keys, self.values, self.H])
        self.conv = CausalConv(self.convolved, config.d_conv, bias=False)
        self.state_weight = tag(nn.Parameter(torch.empty(self.H, self.V, self.V)), "fixed_fan_in", fan_in=self.V, splits=[self.V])
        self.dt_bias = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32")
        self.A_log = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32", "log_decay_rate")
        self.skip = tag(nn.Parameter(torch.empty(self.H, self.V)), "no_decay")
        self.norm = RMSNorm(self.values, config.norm_eps)
        self.out_proj = nn.Linear(self.values, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        """As published: the state's weight the identity, the skip one, A in (0, 16], step sizes log-uniform in [dt_min, dt_max] through the
        inverse of softplus. As a tracker: a state's weight of noise, every gate at TRACKER_KEEP, and a convolution that looks at one token, so that
        short words are not told from their last tokens, of which a state learns nothing."""
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        self.conv.init_weights()
        self.norm.init_weights()
        draw_step_sizes_(self.dt_bias, self.config.dt_min, self.config.dt_max, self.config.dt_floor)
        with torch.no_grad():
            self.A_log.copy_(torch.log((torch.rand(self.H) * 16).clamp(min=1e-3)))
            self.state_weight.copy_(torch.eye(self.V).expand_as(self.state_weight))
            self.skip.fill_(1.0)
            if self.config.start == "tracker":
                self.A_log.zero_()
                self.dt_bias.fill_(math.log(1 / TRACKER_KEEP - 1))  # softplus of it is -log(TRACKER_KEEP)
                self.state_weight.normal_(0.0, self.V**-0.5)
                self.conv.weight.zero_()
                self.conv.weight[:, -1] = TRACKER_INPUT

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "m2rnn_BHKV": "recurrent", "segment_B": "bookkeeping"}

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        if state is not None and self.decodes(x_BTD):
            return self._decode(projected, state, segment_ids)
        starts, past = self.before(projected, self.values, state, segment_ids)
        joint = joint_gradient(projected)
        z, qkv, after, conv_state = self.conv(projected, self.values, past, starts, joint)
        q, k, v = qkv.split([self.keys, self.keys, self.values], -1)
        q_BTGK, k_BTGK, v_BTHV = q.unflatten(-1, (self.G, self.K)), k.unflatten(-1, (self.G, self.K)), v.unflatten(-1, (self.H, self.V))
        g_BTH = self._gates(after)
        if self.slice is not None and state is None:
            o_BTHV = self.over_ranks(self.slice, q_BTGK, k_BTGK, v_BTHV, g_BTH, starts)
        else:
            h0 = state.m2rnn_BHKV if state is not None else None
            o_BTHV, final = m2rnn(q_BTGK, k_BTGK, v_BTHV, g_BTH, self.state_weight, h0, starts)
        o_BTI = (o_BTHV + self.skip.to(o_BTHV.dtype) * v_BTHV).flatten(2)
        y = linear(self.norm(o_BTI, z, columns=(0, joint)), self.out_proj)
        return y, None if state is None else State(conv_state, final, last_segment(segment_ids, state.segment_B))

    @untraced
    def over_ranks(self, slice_: Slice, q_BTGK: Tensor, k_BTGK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, starts: Tensor | None) -> Tensor:
        """The outputs (B, T, H, V) on a slice of time. States pass through a tanh: each rank waits for the one before it, while all else is done side by
        side."""
        empty = g_BTH.new_empty(q_BTGK.shape[0], self.H, self.K, self.V)
        return slice_.in_turn(lambda h0: m2rnn(q_BTGK, k_BTGK, v_BTHV, g_BTH, self.state_weight, h0, starts), empty, "states")

    def _decode(self, projected_B1E: Tensor, state: State, segment_ids: Tensor | None) -> tuple[Tensor, State]:
        starts = document_starts(segment_ids, state.segment_B)
        o_BI, conv, memory = m2rnn_step(
            projected_B1E[:, 0], state.conv_BWI, self.conv.weight, self.dt_bias, self.A_log, self.state_weight, self.skip, state.m2rnn_BHKV,
            None if starts is None else starts[:, 0], self.G, state.in_place,
        )  # fmt: skip
        y = linear(self.norm(o_BI[:, None], projected_B1E[..., : self.values]), self.out_proj)
        return y, State(conv, memory, last_segment(segment_ids, state.segment_B), state.in_place)

    def _gates(self, after_BTH: Tensor) -> Tensor:
        """The logarithms of the forget gates, in fp32 (fp64)."""
        inner = torch.float64 if after_BTH.dtype == torch.float64 else torch.float32
        return -torch.exp(self.A_log.to(inner)) * F.softplus(after_BTH.to(inner) + self.dt_bias.to(inner))

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        return State(*self.conv.with_memory(batch, (self.H, self.K, self.V), device, dtype))

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.conv.bytes_with(self.values * self.K, batch, dtype)

    def flops_per_token(self, T: int) -> int:
        """Projections, convolution, and the recurrence: every row of a state times the head's weight, the outer product, and the output."""
        projections = 2 * self.in_proj.in_features * self.in_proj.out_features + 2 * self.values * self.d_model
        return projections + 2 * self.config.d_conv * self.convolved + self.values * self.K * (2 * self.V + 4)
