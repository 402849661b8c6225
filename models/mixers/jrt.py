"""JRT-RNN (arXiv 2407.05483): linear attention that reads a prompt twice. The first `prompt` tokens of a document are, beside the causal sum, summed whole
by keys and values of their own, so that every token of the document sees all of its prompt, whatever the order of what stands there.

y_i = phi(q_i) (S_e + sum_{j <= i} phi(k_j) v_j) / phi(q_i) (z_e + sum_{j <= i} phi(k_j)), with S_e, z_e the sums over the prompt; phi is the second-order
Taylor map of exp, so that phi(q) phi(k) = 1 + s + s^2 / 2 with s = q k / sqrt(F). What a prompt is, and what must not be scored in it, says
models/prompt.py. Within a call this is a product under a mask, as documents and prompts may begin anywhere; what is carried on has a fixed size.

Legend: B batch, T time, H heads, F feature width, E = 1 + F + F^2 features, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear import linear
from kernels.short_conv import joint_gradient
from models.contract import Role, SequenceMixer
from models.init import init_matrix, tag
from models.layers import CausalConv
from models.prompt import in_prompt, places
from models.segments import document_starts, last_segment

JRT_ROWS = 256  # queries looked at at once


@dataclass
class Config:
    n_heads: int = 4
    feature_dim: int = 16  # F
    prompt: int = 0  # tokens at the beginning of a document that are read twice; 0: plain causal linear attention
    d_conv: int = 4  # width of the short convolution

    def problems(self, d_model: int) -> list[str]:
        problems = []
        if self.n_heads < 1 or d_model % self.n_heads:
            problems.append(f"n_heads must be above zero and divide d_model {d_model}, not {self.n_heads}.")
        if self.feature_dim < 1 or self.prompt < 0 or self.d_conv < 2:
            problems.append("feature_dim must be above zero, prompt zero or more and d_conv above one.")
        return problems


@dataclass
class State:
    """The last convolution inputs; sums of the features times (values, 1) in fp32, those of the prompt in them; the segment of the last token (-1:
    none yet)."""

    conv_BWI: Tensor
    sums_BHEV: Tensor
    segment_B: Tensor


class Mixer(SequenceMixer):
    """prompt: as configured; evaluations set it to the length of their prompt."""

    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model, self.prompt = config, d_model, config.prompt
        self.H, self.F, self.V = config.n_heads, config.feature_dim, d_model // config.n_heads
        keys = self.H * self.F
        self.widths = [keys, keys, d_model, keys, d_model]  # q, k, v, k_e, v_e
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        tag(self.in_proj.weight, splits=list(self.widths))
        self.conv = CausalConv(sum(self.widths), config.d_conv)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        self.conv.init_weights()

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "sums_BHEV": "recurrent", "segment_B": "bookkeeping"}

    def why_not_split(self, T: int = 1 << 62) -> str:
        return "a prompt is summed whole before its first token is read, and no exchange between ranks is written for that"

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        starts = document_starts(segment_ids, None if state is None else state.segment_B)
        _, mixed, _, history = self.conv(projected, 0, None if state is None else state.conv_BWI, starts, joint_gradient(projected))
        inner = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k, v, k_e, v_e = (part.to(inner).unflatten(-1, (self.H, -1)).transpose(1, 2) for part in mixed.split(self.widths, -1))
            v, v_e = (torch.cat([part, torch.ones_like(part[..., :1])], -1) for part in (v, v_e))  # the last column is the normaliser's
            document, place = places(starts, x_BTD.shape[:2], x_BTD.device, None if state is None else state.segment_B)
            prompt = in_prompt(place, self.prompt)
            sums = None if state is None else state.sums_BHEV.to(inner)
            o_BHTV, sums = twice_read(q, k, v, k_e, v_e, document, prompt, sums)
        y = linear(o_BHTV.transpose(1, 2).flatten(2).to(projected.dtype), self.out_proj)
        return y, None if state is None else State(history, sums, last_segment(segment_ids, state.segment_B))

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        kind = dtype or self.in_proj.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32
        sums = torch.zeros(batch, self.H, 1 + self.F + self.F**2, self.V + 1, device=device, dtype=inner)
        return State(self.conv.init_state(batch, device, kind), sums, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def random_state(self, batch: int, T: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """As it would be drawn, but with a normaliser that is one: sums of its features, which are squares, are never below zero."""
        state = super().random_state(batch, T, device, dtype)
        state.sums_BHEV[..., -1] = 0
        state.sums_BHEV[:, :, 0, -1] = T
        return state

    def flops_per_token(self, T: int) -> int:
        """Projections, convolution, and the sums counted as a recurrence: written and read, those of a prompt not counted."""
        products = 2 * self.d_model * (sum(self.widths) + self.d_model) + 2 * self.config.d_conv * sum(self.widths)
        return products + self.H * 4 * (1 + self.F + self.F**2) * (self.V + 1)


def taylor(x: Tensor) -> Tensor:
    """phi (..., E) of x (..., F): 1, x / F^(1/4), and x x^T / (sqrt(2) F^(1/2))."""
    F = x.shape[-1]
    squares = (x[..., :, None] * x[..., None, :]).flatten(-2) * (2 * F) ** -0.5
    return torch.cat([torch.ones_like(x[..., :1]), x * F**-0.25, squares], -1)


def twice_read(
    q: Tensor, k: Tensor, v: Tensor, k_e: Tensor, v_e: Tensor, document: Tensor, prompt: Tensor, sums: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(y (B, H, T, V), the sums after the last token, None if none were given).

    q, k, k_e (B, H, T, F); v, v_e (B, H, T, V + 1), the last column ones; document (B, T): 0 where the text goes on from `sums`; prompt (B, T) bool.
    """
    T = q.shape[2]
    fine, fine_e = ((torch.isfinite(a).all(-1) & torch.isfinite(b).all(-1))[..., None] for a, b in ((k, v), (k_e, v_e)))
    k, v, k_e, v_e = (torch.where(ok, t, 0.0) for ok, t in ((fine, k), (fine, v), (fine_e, k_e), (fine_e, v_e)))
    place, out = torch.arange(T, device=q.device), [v[:, :, :0, :-1]]
    for a in range(0, T, JRT_ROWS):
        rows = slice(a, a + JRT_ROWS)
        same = document[:, rows, None] == document[:, None]
        before, twice = same & (place[rows, None] >= place), same & prompt[:, None]
        total = v.new_zeros(())
        lost = (before[:, None] & ~fine.mT).any(-1, keepdim=True) | (twice[:, None] & ~fine_e.mT).any(-1, keepdim=True)
        for sees, keys, values in ((before, k, v), (twice, k_e, v_e)):
            s = q[:, :, rows] @ keys.mT * q.shape[-1] ** -0.5
            total = total + torch.where(sees[:, None], 1 + s + 0.5 * s * s, 0.0) @ values
        if sums is not None:
            carried = taylor(q[:, :, rows]) @ sums
            total = total + torch.where((document[:, rows] == 0)[:, None, :, None], carried, 0.0)
        y = total[..., :-1] / total[..., -1:]
        out.append(torch.where(lost, torch.nan, y))
    if sums is None or not T:
        return torch.cat(out, 2), sums
    last = (document == document[:, -1:])[:, None, :, None]
    added = torch.where(last, taylor(k), 0.0).mT @ v + torch.where(last & prompt[:, None, :, None], taylor(k_e), 0.0).mT @ v_e
    bad = (last & ~fine).any(2, keepdim=True) | (last & prompt[:, None, :, None] & ~fine_e).any(2, keepdim=True)
    kept = torch.where((document[:, -1] == 0)[:, None, None, None], sums, 0.0)
    return torch.cat(out, 2), torch.where(bad, torch.nan, kept + added)
