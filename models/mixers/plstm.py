"""pLSTM on sequences (arXiv 2506.11997): a linear recurrence C_t = T_t C_{t-1} + S k_t v_t^T of a matrix state per head, whose transition T_t is a small
matrix of the token. The transition is two rotations around a diagonal between -1 and 1, so its eigenvalues may be negative or complex, and
transitions of different tokens need not commute: with that a state can count modulo two and follow a group that is not commutative.

A token is read before it is written: o_t = M C_{t-1} q_t + d (q_t k_t) v_t. The values' width is cut into J parts, which the transition mixes.

Legend: B batch, T time, H heads, K width of queries, keys and values, J size of the transition, V = K / J, C chunks, Q steps of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear import linear
from kernels.short_conv import joint_gradient
from models.contract import Role, SequenceMixer
from models.init import init_matrix, norm_eps_problems, tag
from models.layers import CausalConv, RMSNorm
from models.segments import document_starts, last_segment

PLSTM_CHUNK = 16  # Q


@dataclass
class Config:
    n_heads: int = 4
    head_dim: int = 0  # width of queries, keys and values; 0: d_model / n_heads
    transition: int = 4  # J; 1: a number
    orthogonal: bool = True  # rotations around the transition's diagonal; without them it stays diagonal, and all transitions commute
    d_conv: int = 4  # width of the short convolution
    norm_eps: float = 1e-5

    def problems(self, d_model: int) -> list[str]:
        if min(self.n_heads, self.transition) < 1 or self.head_dim < 0 or self.d_conv < 2:
            return ["n_heads and transition must be above zero, head_dim zero or more and d_conv above one."]
        problems = []
        if not self.head_dim and d_model % self.n_heads:
            problems.append(f"d_model {d_model} is not divisible by n_heads {self.n_heads}; change one or set head_dim.")
        elif (self.head_dim or d_model // self.n_heads) % self.transition:
            problems.append(
                f"the width of a head, {self.head_dim or d_model // self.n_heads}, is not divisible by transition {self.transition}."
            )
        problems += norm_eps_problems(self.norm_eps)
        return problems


@dataclass
class State:
    """The last convolution inputs, the matrix states in fp32, and the segment of the last token (-1: none yet)."""

    conv_BWI: Tensor
    cell_BHJKV: Tensor
    segment_B: Tensor


class Mixer(SequenceMixer):
    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model, self.H, self.J = config, d_model, config.n_heads, config.transition
        self.K = config.head_dim or d_model // config.n_heads
        self.inner, self.pairs = self.H * self.K, self.J * (self.J - 1) // 2 * config.orthogonal
        rates = self.H * (self.J + 2 * self.pairs)  # columns: diagonals, angles of the rotation behind it and of that before it
        self.in_proj = nn.Linear(d_model, 4 * self.inner + rates, bias=False)
        tag(self.in_proj.weight, splits=[*[self.inner] * 4, rates])  # output gate, q, k, v
        self.conv = CausalConv(3 * self.inner, config.d_conv, bias=False)
        self.transition_bias = tag(nn.Parameter(torch.empty(self.H, self.J + 2 * self.pairs)), "no_decay", "keep_fp32")
        self.source = tag(nn.Parameter(torch.empty(self.H, self.J, self.J)), "no_decay", "keep_fp32")
        self.mark = tag(nn.Parameter(torch.empty(self.H, self.J, self.J)), "no_decay", "keep_fp32")
        self.direct = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32")
        self.norm = RMSNorm(self.K, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        """Transitions start near the identity: diagonals of 0.96 to 0.9999 by heads, no rotation; source and mark as identities."""
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        self.conv.init_weights()
        self.norm.init_weights()
        with torch.no_grad():
            self.transition_bias.zero_()
            self.transition_bias[:, : self.J] = torch.linspace(0.4, 1.0, self.H)[:, None]
            self.source.copy_(torch.eye(self.J).expand(self.H, -1, -1))
            self.mark.copy_(torch.eye(self.J).expand(self.H, -1, -1))
            self.direct.fill_(1.0)

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "cell_BHJKV": "recurrent", "segment_B": "bookkeeping"}

    def why_not_split(self, T: int = 1 << 62) -> str:
        return "no exchange between ranks is written for products of transition matrices"

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        starts = document_starts(segment_ids, None if state is None else state.segment_B)
        joint = joint_gradient(projected)
        z, qkv, rates, history = self.conv(projected, self.inner, None if state is None else state.conv_BWI, starts, joint)
        inner = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k, v = (part.to(inner).unflatten(-1, (self.H, self.K)) for part in qkv.chunk(3, -1))
            before = None if state is None else state.cell_BHJKV.to(inner)
            v_BTHJV = v.unflatten(-1, (self.J, -1))
            written = self.source.to(inner) @ v_BTHJV
            r_BTHJV, cell = plstm(q, k, written, self.transitions(rates.to(inner)), before, starts)
            seen = (self.direct.to(inner) * (q * k).sum(-1))[..., None, None] * v_BTHJV
            o = ((self.mark.to(inner) @ r_BTHJV + seen) * self.K**-0.5).flatten(2).to(projected.dtype)
        o = self.norm(o, z, heads=self.H, norm_first=True, dtype=o.dtype, columns=(0, joint))
        y = linear(o, self.out_proj)
        return y, None if state is None else State(history, cell, last_segment(segment_ids, state.segment_B))

    def transitions(self, rates_BTE: Tensor) -> Tensor:
        """(B, T, H, J, J): rotation diag(tanh(5 ...)) rotation, no singular value above one."""
        rates = rates_BTE.unflatten(-1, (self.H, -1)) + self.transition_bias.to(rates_BTE.dtype)
        diagonal, behind, ahead = rates.split([self.J, self.pairs, self.pairs], -1)
        diagonal = torch.tanh(5 * diagonal)
        if not self.pairs:
            return torch.diag_embed(diagonal)
        return (rotation(behind, self.J) * diagonal[..., None, :]) @ rotation(ahead, self.J)

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        kind = dtype or self.in_proj.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32
        cell = torch.zeros(batch, self.H, self.J, self.K, self.K // self.J, device=device, dtype=inner)
        return State(self.conv.init_state(batch, device, kind), cell, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def flops_per_token(self, T: int) -> int:
        """Projections, convolution, transitions, and the recurrence counted as a recurrence (moved on, written, read)."""
        products = 2 * self.d_model * (self.in_proj.out_features + self.inner) + 6 * self.config.d_conv * self.inner
        return products + (24 * 2 * self.J**3 * self.H if self.pairs else 0) + 2 * self.inner * self.K * (self.J + 2)


def rotation(angles: Tensor, J: int) -> Tensor:
    """(..., J, J) exponentials of skew matrices with entries pi tanh(angles) (..., J (J - 1) / 2): by eight terms at a sixteenth, squared four times."""
    row, column = torch.triu_indices(J, J, 1, device=angles.device)
    place = torch.zeros(len(row), J, J, device=angles.device, dtype=angles.dtype)
    index = torch.arange(len(row), device=angles.device)
    place[index, row, column], place[index, column, row] = 1.0, -1.0
    skew = torch.einsum("...p,pij->...ij", math.pi / 16 * torch.tanh(angles), place)
    eye = torch.eye(J, device=angles.device, dtype=angles.dtype)
    power = eye + skew / 8
    for term in range(7, 0, -1):
        power = eye + skew @ power / term
    for _ in range(4):
        power = power @ power
    return power


def plstm(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHJV: Tensor, T_BTHJJ: Tensor, cell_BHJKV: Tensor | None, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(C_{t-1} q_t (B, T, H, J, V), last state) of C_t = T_t C_{t-1} + k_t v_t^T: whole chunks, then what is left of the row."""
    (B, T, H, K), (J, V) = q_BTHK.shape, v_BTHJV.shape[3:]
    cell = q_BTHK.new_zeros(B, H, J, K, V) if cell_BHJKV is None else cell_BHJKV
    out, whole, Q = [v_BTHJV[:, :0]], T - T % PLSTM_CHUNK, PLSTM_CHUNK
    for part, size in ((slice(0, whole), Q), (slice(whole, T), T - whole)):
        if part.stop > part.start:
            q, k, v, T_ = (t[:, part].unflatten(1, (-1, size)).transpose(2, 3) for t in (q_BTHK, k_BTHK, v_BTHJV, T_BTHJJ))
            document = None if starts_BT is None else starts_BT[:, part].unflatten(1, (-1, size)).int().cumsum(2)
            y, cell = plstm_chunks(q, k, v, T_, cell, document)
            out.append(y.transpose(2, 3).flatten(1, 2))
    return torch.cat(out, 1), cell


def plstm_chunks(q: Tensor, k: Tensor, v: Tensor, T: Tensor, cell: Tensor, document: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is read (B, C, H, Q, J, V), and the state after the last chunk. q, k (B, C, H, Q, K), v (B, C, H, Q, J, V), T (B, C, H, Q, J, J), document
    (B, C, Q): how many documents have begun in the chunk."""
    (B, C, H, Q, J), last = v.shape[:5], v.shape[3] - 1
    fine = (torch.isfinite(k).all(-1) & torch.isfinite(v).flatten(4).all(-1))[..., None]  # what is not finite stays in its document
    k, v = torch.where(fine, k, 0.0), torch.where(fine[..., None], v, 0.0)
    # Products of the transitions from the chunk's start (place 0) and from behind each token (places 1 to Q) to before token i, and to the end.
    eye = torch.eye(J, device=v.device, dtype=v.dtype).expand(B, C, H, 1, J, J)
    none = v.new_zeros(B, C, H, Q - 1, J, J)
    through, rows = torch.cat([eye, none, 0 * eye], 3), []
    for i in range(Q):
        if document is not None:
            begins = document[:, :, i] != (document[:, :, i - 1] if i else 0)
            through = torch.where(begins[:, :, None, None, None, None], 0.0, through)
        rows.append(through)
        moved = T[:, :, :, i, None] @ through
        through = torch.cat([moved[:, :, :, : i + 1], eye, moved[:, :, :, i + 2 :]], 3)
    paths = torch.stack(rows, 3)  # (B, C, H, i, place, J, J)
    scores = (q @ k.mT)[..., None, None] * paths[:, :, :, :, 1:]
    read = (scores.movedim(5, 4).flatten(5, 6).flatten(3, 4) @ v.flatten(3, 4)).unflatten(3, (Q, J))
    added = torch.einsum("bchjmn,bchjk,bchjnv->bchmkv", through[:, :, :, 1:], k, v)
    sees = torch.ones(Q, Q, dtype=torch.bool, device=v.device).tril()[None, None]
    if document is not None:
        sees = sees & (document[..., :, None] == document[..., None, :])
    lost = (sees[:, :, None] & ~fine.mT).any(-1)[..., None, None]
    out = []
    for c in range(C):
        carried = torch.einsum("bhimn,bhnkv,bhik->bhimv", paths[:, c, :, :, 0], cell, q[:, c])
        moved = torch.einsum("bhmn,bhnkv->bhmkv", through[:, c, :, 0], cell)
        if document is not None:
            carried = torch.where((document[:, c] == 0)[:, None, :, None, None], carried, 0.0)
            moved = torch.where((document[:, c, last] == 0)[:, None, None, None, None], moved, 0.0)
        out.append(torch.where(lost[:, c], torch.nan, read[:, c] + carried))
        cell = torch.where(lost[:, c, :, last, :, :, None], torch.nan, moved + added[:, c])
    return torch.stack(out, 1), cell
