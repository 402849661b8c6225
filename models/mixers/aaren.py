"""Attention as a recurrence (Aaren, arXiv 2405.13956): each head has one learned query, which does not depend on the token, so softmax attention over
all tokens so far is a running average that two tensors carry on.

With c_t the logarithm of the sum of exp(s_i) so far, o_t = exp(c_{t-1} - c_t) o_{t-1} + exp(s_t - c_t) v_t. The sum only grows: nothing is ever
forgotten, and what comes late counts little. Legend: B batch, T time, H heads, K head width, C chunks, Q steps of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import linear
from kernels.short_conv import joint_gradient
from models.contract import Role, SequenceMixer
from models.init import init_matrix, normal_, tag
from models.layers import CausalConv
from models.segments import document_starts, last_segment

AAREN_CHUNK = 64  # Q
NOTHING = -1e30  # the logarithm of the sum before the first token


@dataclass
class Config:
    n_heads: int = 8
    d_conv: int = 4  # width of the short convolution on keys and values; 0: none, as published
    gate: bool = False  # a SiLU gate on the outputs, which is not in the paper

    def problems(self, d_model: int) -> list[str]:
        problems = []
        if self.n_heads < 1 or d_model % self.n_heads:
            problems.append(f"n_heads must be above zero and divide d_model {d_model}, not {self.n_heads}.")
        if self.d_conv < 0 or self.d_conv == 1:
            problems.append("d_conv must be 0 (no convolution) or above one.")
        return problems


@dataclass
class State:
    """The last convolution inputs; logarithms of the sums and the averages in fp32; the segment of the last token (-1: none yet)."""

    conv_BWI: Tensor
    log_sum_BH: Tensor
    average_BHK: Tensor
    segment_B: Tensor


class Mixer(SequenceMixer):
    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model, self.H, self.K = config, d_model, config.n_heads, d_model // config.n_heads
        self.first = d_model if config.gate else 0  # columns of the gate
        self.in_proj = nn.Linear(d_model, self.first + 2 * d_model, bias=False)
        tag(self.in_proj.weight, splits=[*[d_model] * config.gate, d_model, d_model])
        self.conv = CausalConv(2 * d_model, config.d_conv) if config.d_conv else None
        self.query = tag(nn.Parameter(torch.empty(self.H, self.K)), "no_decay", "keep_fp32")
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        normal_(self.query, 1.0)
        if self.conv is not None:
            self.conv.init_weights()

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "log_sum_BH": "recurrent", "average_BHK": "recurrent", "segment_B": "bookkeeping"}

    def named_memories(self, state: State) -> dict[str, Tensor]:
        return {"sum": state.log_sum_BH[..., None], "average": state.average_BHK}

    def why_not_split(self, T: int = 1 << 62) -> str:
        return "no exchange between ranks is written for running softmax averages"

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        starts = document_starts(segment_ids, None if state is None else state.segment_B)
        history = None if state is None else state.conv_BWI
        if self.conv is not None:
            z, kv, _, history = self.conv(projected, self.first, history, starts, joint_gradient(projected))
        else:
            z, kv = projected.split([self.first, 2 * self.d_model], -1)
        inner = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_BTD.device.type, enabled=False):
            k_BTHK, v_BTHK = (part.to(inner).unflatten(-1, (self.H, self.K)) for part in kv.chunk(2, -1))
            s_BTH = (k_BTHK * self.query.to(inner)).sum(-1) * self.K**-0.5
            if state is None:
                B, H, K = x_BTD.shape[0], self.H, self.K
                log_sum, average = s_BTH.new_full((B, H), NOTHING), v_BTHK.new_zeros(B, H, K)
            else:
                log_sum, average = state.log_sum_BH.to(inner), state.average_BHK.to(inner)
            o_BTHK, log_sum, average = running_average(s_BTH, v_BTHK, log_sum, average, starts)
        o = o_BTHK.flatten(2).to(projected.dtype)
        y = linear(o * F.silu(z) if self.config.gate else o, self.out_proj)
        if state is None:
            return y, None
        assert history is not None
        return y, State(history, log_sum, average, last_segment(segment_ids, state.segment_B))

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        kind = dtype or self.in_proj.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32
        conv = torch.zeros(batch, max(0, self.config.d_conv - 1), 2 * self.d_model, device=device, dtype=kind)
        log_sum = torch.full((batch, self.H), NOTHING, device=device, dtype=inner)
        average = torch.zeros(batch, self.H, self.K, device=device, dtype=inner)
        return State(conv, log_sum, average, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def flops_per_token(self, T: int) -> int:
        """Projections and convolution; the average counted as a recurrence (scores, and two products for each number of state)."""
        D = self.d_model
        return 2 * D * (self.first + 2 * D) + 2 * D * D + 4 * self.config.d_conv * D + 2 * D + 4 * D


def running_average(
    s_BTH: Tensor, v_BTHK: Tensor, log_sum_BH: Tensor, average_BHK: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(averages of v so far weighted by exp(s), within documents (B, T, H, K); the last logarithm of the sum and average).

    A chunk is attention over its own tokens and one more, which stands for all before it.
    """
    out = [v_BTHK[:, :0]]
    for a in range(0, s_BTH.shape[1], AAREN_CHUNK):
        s_BHQ, v_BHQK = s_BTH[:, a : a + AAREN_CHUNK].transpose(1, 2), v_BTHK[:, a : a + AAREN_CHUNK].transpose(1, 2)
        Q = s_BHQ.shape[2]
        sees = torch.ones(Q, Q, dtype=torch.bool, device=s_BTH.device).tril()[None]
        reached = sees.new_ones(1, Q, 1)
        if starts_BT is not None:
            document_BQ = starts_BT[:, a : a + AAREN_CHUNK].int().cumsum(1)
            sees = sees & (document_BQ[:, :, None] == document_BQ[:, None])
            reached = (document_BQ == 0)[..., None]
        allowed = torch.cat([reached, sees], 2)[:, None]
        scores, values = torch.cat([log_sum_BH[..., None], s_BHQ], 2), torch.cat([average_BHK[:, :, None], v_BHQK], 2)
        # A weight of zero does not keep out what is not finite, which is to stay in its document.
        fine = torch.isfinite(scores) & torch.isfinite(values).all(-1)
        lost_BHQ1 = (allowed & ~fine[:, :, None]).any(-1, keepdim=True)
        scores = torch.where(fine, scores, 0.0)[:, :, None].masked_fill(~allowed, float("-inf"))
        o_BHQK = torch.where(lost_BHQ1, torch.nan, scores.softmax(-1) @ torch.where(fine[..., None], values, 0.0))
        log_sum_BH, average_BHK = scores[:, :, -1].logsumexp(-1), o_BHQK[:, :, -1]
        out.append(o_BHQK.transpose(1, 2))
    return torch.cat(out, 1), log_sum_BH, average_BHK
