"""Gated moving average: in every channel h_t = a_t h_{t-1} + (1 - a_t) u_t, with gates a and inputs u projected from the token.

The mixer to copy for one of your own (CONTRIBUTING.md); a test adds it to the project as it stands. Legend: B batch, T time, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contract import SequenceMixer, document_starts, last_segment
from models.init import init_matrix, tag


@dataclass
class Config:
    gate_bias: float = 1.0  # of the gates at first: the larger, the longer they remember

    def problems(self, d_model: int) -> list[str]:
        return [] if abs(self.gate_bias) <= 20 else [f"gate_bias must lie between -20 and 20, not {self.gate_bias}."]


@dataclass
class State:
    """The averages in fp32, and the segment of the last token (-1: none yet)."""

    h_BD: Tensor
    segment_B: Tensor


class Mixer(SequenceMixer):
    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.gate_bias = tag(nn.Parameter(torch.empty(d_model)), "no_decay", "keep_fp32")
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)  # writes into the residual stream: starts smaller with depth

    def init_weights(self, std: float, n_layers: int) -> None:
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        nn.init.constant_(self.gate_bias, self.config.gate_bias)

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        wide = torch.promote_types(dtype or self.in_proj.weight.dtype, torch.float32)
        zeros = torch.zeros(batch, self.d_model, device=device, dtype=wide)
        return State(zeros, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        gate_BTD, u_BTD = self.in_proj(x_BTD).to(torch.promote_types(x_BTD.dtype, torch.float32)).chunk(2, -1)
        a_BTD = torch.sigmoid(gate_BTD + self.gate_bias)
        new_BTD = (1 - a_BTD) * u_BTD
        slice_ = self.slice if state is None else None  # this rank's part of the time, if it is cut over ranks
        starts_BT = slice_.starts(segment_ids) if slice_ else document_starts(segment_ids, None if state is None else state.segment_B)
        if starts_BT is not None:
            a_BTD = a_BTD.masked_fill(starts_BT[..., None], 0.0)
        h_BTD, through_BTD = averages(a_BTD, new_BTD)
        before_BD = None if state is None else state.h_BD
        if slice_:
            before_BD = slice_.carried(h_BTD[:, -1], through_BTD[:, -1])
        if before_BD is not None:
            h_BTD = h_BTD + times(through_BTD, before_BD[:, None])
        y_BTD = self.out_proj(h_BTD.to(x_BTD.dtype))
        if state is None:
            return y_BTD, None
        last_BD = torch.cat([state.h_BD[:, None], h_BTD], 1)[:, -1]  # of no tokens: the one before
        return y_BTD, State(last_BD, last_segment(segment_ids, state.segment_B))

    def flops_per_token(self, T: int) -> int:
        return 2 * 3 * self.d_model**2

    def why_not_split(self, T: int = 1 << 62) -> str:
        return ""  # forward asks self.slice


def times(a: Tensor, before: Tensor) -> Tensor:
    """a times what was before; nothing comes through zero, where a document starts, not even what is not a number."""
    return a * torch.where(a == 0, 0.0, before)


def averages(a_BTD: Tensor, new_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """(h_t = a_t h_{t-1} + new_t from zero, the products of a up to t), by doubling what is summed."""
    h_BTD, reach = new_BTD, 1
    while reach < a_BTD.shape[1]:
        h_before, a_before = (F.pad(t[:, :-reach], (0, 0, reach, 0), value=fill) for t, fill in ((h_BTD, 0.0), (a_BTD, 1.0)))
        h_BTD, a_BTD, reach = h_BTD + times(a_BTD, h_before), times(a_BTD, a_before), 2 * reach
    return h_BTD, a_BTD
