"""The published ParaRNN mixer around any cell: in-projection, convolution, cell, gated norm, out-projection (arXiv 2510.21450, fig. 9).

A cell whose step multiplies with matrices (`Mat`) has dense heads of `head_size` channels, and kernels/dense_rnn solves it.

Legend: B batch, T time, I inner width (the cell's channels), E heads of the input projection with K = I / E channels, P projections the cell
wants, G its matrices, S its states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import decode_step
from kernels.dense_rnn import dense_rnn, dense_rnn_step, ranks
from kernels.linear import linear, of_heads
from kernels.parallel_rnn import adjoint, parallel_rnn, parallel_rnn_step, reference, solved, with_bias
from kernels.parallel_rnn.cell import Cell, biased
from kernels.short_conv import joint_gradient
from models.cells import bias_init, load_cell
from models.contract import Role, SequenceMixer
from models.init import init_matrix, norm_eps_problems, normal_, tag
from models.layers import CausalConv, RMSNorm
from models.segments import document_starts, last_segment
from models.slices import Slice, traffic, untraced

BURN_IN = 512  # last steps of a slice of time, walked from zero, whose end is the first guess of the next slice's start


@dataclass
class Config:
    cell: str = "paragru"  # a file of models/cells/
    n_heads: int = 4  # blocks of the cell's block-diagonal input projection
    head_size: int = 0  # channels of a head of a cell with matrices; 0: 64, or the whole width where that is less
    expand: float = 1.0  # cell channels / d_model
    d_conv: int = 4  # width of the short convolution; 0: none
    gate: bool = True  # silu gate from the in-projection
    norm: bool = True  # RMSNorm of the (gated) states
    recurrent_bound: str = "clip"  # none | clip (to +-recurrent_max) | tanh (recurrent_max * tanh of the parameter)
    recurrent_max: float = 0.5
    recurrent_init: float = 0.0  # standard deviation of the initial recurrent weights; 0: 1/sqrt(inner width)
    bias_init: dict[str, Any] | None = (
        None  # initial biases of the cell's inputs by name, numbers or pairs over the channels; null: the cell's
    )
    norm_eps: float = 1e-5

    def problems(self, d_model: int) -> list[str]:
        problems, inner, dense = [], round(self.expand * d_model), False
        try:
            cell = load_cell(self.cell)
            bias_init(self.cell, self.bias_init)
            problem, dense = cell.problem(inner) if inner > 0 else "", bool(cell.mat)
        except ValueError as reason:
            problem = str(reason)
        problems += [problem] if problem else []
        if self.n_heads < 1 or inner < 1:
            problems.append("n_heads and expand must be above zero.")
        elif inner % self.n_heads:
            problems.append(f"expand x d_model = {inner} is not divisible by n_heads {self.n_heads}.")
        if self.head_size < 0 or self.head_size and not dense and not problem:
            dense_or_not = "at least 0 (64)" if dense else f"0, as the cell {self.cell} has no matrices"
            problems.append(f"head_size must be {dense_or_not}, not {self.head_size}.")
        elif dense and inner > 0 and inner % self.channels_of_head(inner):
            problems.append(f"expand x d_model = {inner} is not divisible by head_size {self.channels_of_head(inner)}.")
        if self.d_conv < 0 or self.d_conv == 1:
            problems.append("d_conv must be 0 (no convolution) or above one.")
        if self.recurrent_bound not in ("none", "clip", "tanh"):
            problems.append(f"recurrent_bound is {self.recurrent_bound!r}; choose none, clip or tanh.")
        if self.recurrent_max <= 0:
            problems.append(f"recurrent_max must be above zero, not {self.recurrent_max}.")
        problems += norm_eps_problems(self.norm_eps)
        if self.recurrent_init < 0:
            problems.append(f"recurrent_init must be a standard deviation or 0 (derived), not {self.recurrent_init}.")
        return problems

    @property
    def remakes_states(self) -> bool:
        """Whether a backward pass can make states again from those that slices start from: of dense heads that fit on a multiprocessor in any dtype."""
        cell = load_cell(self.cell)
        return bool(cell.mat) and len(cell.state) > 1 and (self.head_size or 64) <= 64

    def channels_of_head(self, inner: int) -> int:
        """Of a cell with matrices, on `inner` channels."""
        return self.head_size or min(64, inner)


@dataclass
class State:
    """The last convolution inputs, the cell's states in fp32, and the segment of the last token (-1: none yet)."""

    conv_BWI: Tensor
    cell_BSI: Tensor
    segment_B: Tensor


class Mixer(SequenceMixer):
    recurrence = "parallel_rnn"
    learner = 0  # the number of a layer whose plan is learnt in training (kernels/dense_rnn/plans.py, training/plans.py)

    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model = config, d_model
        self.inner = round(config.expand * d_model)
        self.cell = load_cell(config.cell)
        if self.cell.mat:
            self.recurrence = "dense_rnn"
        P, R, E = len(self.cell.pre), len(self.cell.rec), config.n_heads
        self.in_proj = nn.Linear(d_model, self.inner * (2 if config.gate else 1), bias=False)
        tag(self.in_proj.weight, splits=[self.inner] * (2 if config.gate else 1))
        self.conv = CausalConv(self.inner, config.d_conv) if config.d_conv else None
        width = self.inner // E
        self.cell_weight = tag(nn.Parameter(torch.empty(E, width, P * width)), fan_in=width, splits=[width] * P)
        self.cell_bias = tag(nn.Parameter(torch.empty(P, self.inner)), "no_decay")
        self.recurrent = tag(nn.Parameter(torch.empty(R, self.inner)), "no_decay", "keep_fp32") if R else None
        G, K = len(self.cell.mat), config.channels_of_head(self.inner)
        self.matrices = tag(nn.Parameter(torch.empty(self.inner // K, K, G * K)), "fixed_fan_in", fan_in=K, splits=[K] * G) if G else None
        if self.recurrent is not None and not config.recurrent_init:
            tag(self.recurrent, "falls_with_width")
        self.norm = RMSNorm(self.inner, config.norm_eps) if config.norm else None
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        """Projections as everywhere; input projection and matrices of the cell 1/sqrt(fan in); recurrent weights small; biases as the cell
        asks."""
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        normal_(self.cell_weight, self.cell_weight.shape[1] ** -0.5)
        if self.conv is not None:
            self.conv.init_weights()
        if self.norm is not None:
            self.norm.init_weights()
        with torch.no_grad():
            self.cell_bias.zero_()
            for name, (low, high) in bias_init(self.config.cell, self.config.bias_init).items():
                self.cell_bias[self.cell.pre.index(name)] = torch.linspace(low, high, self.inner)
        if self.matrices is not None:
            normal_(self.matrices, self.config.recurrent_init or self.matrices.shape[1] ** -0.5)
        if self.recurrent is not None:
            normal_(self.recurrent, self.config.recurrent_init or self.inner**-0.5)
            if self.config.recurrent_bound == "tanh":  # the weights the cell sees start alike, whatever bounds them
                limit = self.config.recurrent_max
                with torch.no_grad():
                    self.recurrent.copy_(torch.atanh((self.recurrent / limit).clamp(-0.99, 0.99)))

    def recurrent_weights(self) -> Tensor:
        """(R, I) as the cell sees them, bounded as configured."""
        if self.recurrent is None:
            return self.cell_bias.new_zeros(0, self.inner)
        limit = self.config.recurrent_max
        if self.config.recurrent_bound == "clip":
            return self.recurrent.clamp(-limit, limit)
        return limit * torch.tanh(self.recurrent) if self.config.recurrent_bound == "tanh" else self.recurrent

    def _project(self, u_BTI: Tensor) -> Tensor:
        """The cell's inputs without their bias, (B, T, P, E, K): each head's channels only read that head's. The product's layout is kept."""
        (B, T, _), E, P = u_BTI.shape, self.config.n_heads, len(self.cell.pre)
        pre_ENO = of_heads(u_BTI.reshape(B * T, E, self.inner // E), self.cell_weight)
        return pre_ENO.view(E, B, T, P, self.inner // E).permute(1, 2, 3, 0, 4)

    def _solve(self, pre: Tensor, rec: Tensor, before_BSI: Tensor | None, starts: Tensor | None, decoding: bool) -> tuple[Tensor, Tensor]:
        """(emitted states (B, T, I), final states (B, S, I)) of inputs (B, T, P, E, K)."""
        cell, bias, matrices = self.cell, self.cell_bias, self.matrices
        dense = None if matrices is None else matrices.unflatten(2, (len(cell.mat), -1))
        if decoding and before_BSI is not None:
            before = before_BSI if starts is None else torch.where(starts[..., None], 0.0, before_BSI)
            if dense is None:
                final = parallel_rnn_step(cell, pre[:, 0].flatten(2), rec, before, bias)
            else:
                final = dense_rnn_step(cell, pre[:, 0].flatten(2), rec, dense, before, bias)
            return final[:, None, -1].to(pre.dtype), final
        if dense is None:
            return parallel_rnn(cell, pre, rec, before_BSI, starts, bias_PD=bias, emitted=True)
        learner, save = (self.learner if self.training else 0), "borders" if self.remakes_states else "states"
        return dense_rnn(cell, pre, rec, dense, before_BSI, starts, bias_PD=bias, learner=learner, save=save)

    def state_roles(self) -> dict[str, Role]:
        return {"conv_BWI": "history", "cell_BSI": "recurrent", "segment_B": "bookkeeping"}

    def named_memories(self, state: State) -> dict[str, Tensor]:
        """(B, I) of each state of the cell."""
        return {name: state.cell_BSI[:, i] for i, name in enumerate(self.cell.state)}

    def why_not_split(self, T: int = 1 << 62) -> str:
        if not self.cell.lowered:
            return f"its cell is solved as a loop ({self.cell.why_loop.rstrip('.')})"
        return self.conv.why_not_split(T) if self.conv is not None else ""

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected = linear(x_BTD, self.in_proj)
        slice_ = self.slice if state is None else None
        starts = slice_.starts(segment_ids) if slice_ else document_starts(segment_ids, state.segment_B if state is not None else None)
        conv_state = state.conv_BWI if state is not None else None
        joint = joint_gradient(projected) if self.conv is not None else None
        if self.conv is not None:
            conv_state = slice_.halo(projected[..., : self.inner], self.conv.width, segment_ids) if slice_ else conv_state
            _, u, gate, conv_state = self.conv(projected, 0, conv_state, starts, joint)
        else:
            u, gate = projected.split([self.inner, projected.shape[-1] - self.inner], -1)
        cell_state = state.cell_BSI if state is not None else None
        pre_BTPEK, rec_RI, bias_PI = self._project(u), self.recurrent_weights(), self.cell_bias
        if slice_:
            h = self.over_ranks(slice_, pre_BTPEK, rec_RI, starts, bias_PI)
        else:
            decoding = x_BTD.shape[1] == 1 and not torch.is_grad_enabled()
            h, final = self._solve(pre_BTPEK, rec_RI, cell_state, starts, decoding)
        gate = gate if self.config.gate else None
        if self.norm is not None:
            h = self.norm(h, gate, norm_first=True, columns=(self.inner, joint))
        elif gate is not None:
            h = h * F.silu(gate)
        y = linear(h, self.out_proj)
        if state is None:
            return y, None
        assert conv_state is not None
        return y, State(conv_state, final, last_segment(segment_ids, state.segment_B))

    @untraced
    def over_ranks(self, slice_: Slice, pre: Tensor, rec: Tensor, starts: Tensor | None, bias: Tensor) -> Tensor:
        """The cell's emitted states (B, T, I) on a slice of time; arguments as of `parallel_rnn`.

        Multiple shooting with one slice a rank: solve from a guessed start; where a correction of the starts by the slices' Jacobian
        products is more than the tolerance of what earlier states left there (`reference.share`), solve again. N - 1 corrections make every
        slice exact, whatever the Jacobians are.
        """
        cell, rec = biased(self.cell), with_bias(rec, bias)
        if self.matrices is not None:
            return _dense_over_ranks(slice_, cell, pre, rec, self.matrices, starts, self.learner if self.training else 0)
        with torch.autocast(pre.device.type, enabled=False):
            start = _guessed_starts(slice_, cell, pre, rec, starts)
            for correction in range(slice_.size):
                h0 = start[:, slice_.rank].contiguous()
                emitted, saved, final = solved(cell, pre, rec, h0, starts)
                traffic.solves += 1
                if correction == slice_.size - 1:
                    break
                _, product, left = adjoint(cell, pre, rec, h0, starts, (emitted, saved), None)
                end = final.detach()
                here = torch.cat([end[:, None], torch.maximum(left, end.abs())[:, None], product], 1)
                ends, lefts, products = slice_.gather(here, "checks").transpose(0, 1).split([1, 1, product.shape[1]], 2)
                corrected = reference.corrected(ends[:, :, 0], products, start)
                change = reference.share((corrected - start)[:, 1:], reference.remainders(products, lefts[:, :, 0])[:, :-1])
                if change <= reference.tolerance(cell, pre.dtype):  # all ranks hold the same numbers, so all stop together
                    break
                traffic.corrections += 1
                start = corrected
            local = _LocalAdjoint(cell)
            return slice_.with_adjoint_from_right(emitted, final, local, _through, pre, rec, h0, starts, emitted, saved)

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: State) -> Callable[[], None] | None:
        K, within = self.config.channels_of_head(self.inner), self.inner // self.config.n_heads
        if not self.cell.lowered or self.matrices is not None and not decode_step.steps_dense_heads(K, within):
            return None
        state.segment_B.clamp_(min=0)  # as last_segment does
        inner, groups = self.inner, self.config.n_heads
        projected_BI = x_BD.new_empty(x_BD.shape[0], self.in_proj.out_features)
        rec_RI = self.recurrent_weights().detach().float().contiguous()
        weight = self.cell_weight.detach().reshape(groups, inner // groups, -1)
        gate = projected_BI[:, inner:] if self.config.gate else None
        matrices = None if self.matrices is None else self.matrices.detach()
        conv = None if self.conv is None else decode_step.Convolution(0, self.conv.weight, self.conv.bias, state.conv_BWI)
        after, eps = (None, 0.0) if self.norm is None else (self.norm.weight, self.norm.eps)
        gain = norm.gain.detach()

        def step() -> None:
            decode_step.project(x_BD, self.in_proj.weight, projected_BI, norm_K=gain, eps=norm.eps, conv=conv, silu=(inner, 2 * inner))
            if matrices is None:
                decode_step.cell_step(self.cell, projected_BI, weight, self.cell_bias, rec_RI, state.cell_BSI)
            else:
                decode_step.dense_cell_step(self.cell, projected_BI, weight, self.cell_bias, rec_RI, matrices, state.cell_BSI)
            h_BI = state.cell_BSI[:, -1]
            decode_step.project(h_BI, self.out_proj.weight, x_BD, norm_K=after, eps=eps, gate_BK=gate, add=True, keep_N=keep_D)

        return step

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        kind = dtype or self.in_proj.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32
        conv = torch.zeros(batch, max(0, self.config.d_conv - 1), self.inner, device=device, dtype=kind)
        cell = torch.zeros(batch, len(self.cell.state), self.inner, device=device, dtype=inner)
        return State(conv, cell, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        return batch * self.inner * (max(0, self.config.d_conv - 1) * dtype.itemsize + 4 * len(self.cell.state))

    def state_flops_per_token(self) -> int:
        return 0 if self.matrices is None else 2 * self.matrices.numel()

    def flops_per_token(self, T: int) -> int:
        """Projections and convolution; the cell's own few operations per channel are not matrix work and are counted as 2 per weight."""
        widths = self.d_model * self.inner * (3 if self.config.gate else 2)
        cell = len(self.cell.pre) * self.inner * self.inner // self.config.n_heads
        cell += 0 if self.matrices is None else self.matrices.numel()
        return math.ceil(2 * (widths + cell + self.config.d_conv * self.inner + len(self.cell.rec) * self.inner))


def _dense_over_ranks(slice_: Slice, cell: Cell, pre: Tensor, rec: Tensor, matrices: Tensor, starts: Tensor | None, learner: int) -> Tensor:
    """`over_ranks` of a cell with matrices, whose adjoint is corrected as its states are."""

    def count(what: str) -> None:
        setattr(traffic, what, getattr(traffic, what) + 1)

    part = ranks.Part(slice_.rank, slice_.size, slice_.gather, count, learner)
    with torch.autocast(pre.device.type, enabled=False):
        return ranks.over_ranks(cell, pre, rec, matrices.unflatten(2, (len(cell.mat), -1)), starts, part)


@torch.no_grad()
def _guessed_starts(slice_: Slice, cell: Cell, pre: Tensor, rec: Tensor, starts: Tensor | None) -> Tensor:
    """(B, N, S, I): a first guess of the states that all slices start in: zero, then what each slice's last steps alone end in."""
    first = max(0, pre.shape[1] - BURN_IN)
    _, end = parallel_rnn(cell, pre[:, first:], rec, None, None if starts is None else starts[:, first:], emitted=True)
    ends = slice_.gather(end, "states").transpose(0, 1)
    return torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)


def _through(jacobians_BSSI: Tensor, adjoint_BSI: Tensor) -> Tensor:
    """Jacobians applied to an adjoint. Nothing comes through zeros, as where a document starts, not even what is not a number."""
    product = jacobians_BSSI * adjoint_BSI[:, None]
    return torch.where(jacobians_BSSI == 0, torch.zeros_like(jacobians_BSSI), product).sum(2)


@dataclass(frozen=True)
class _LocalAdjoint:
    """The adjoint of a slice of a cell's recurrence by itself, as `Slice.with_adjoint_from_right` calls it."""

    cell: Cell

    def __call__(
        self, d_emitted: Tensor, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, emitted: Tensor, saved: Tensor
    ) -> tuple[Tensor, Tensor]:
        start, product, *_ = adjoint(self.cell, pre, rec, h0, starts, (emitted, saved), d_emitted)
        product = product if starts is None else reference.zeroed(product, starts.any(1)[:, None, None, None])
        return start, product.transpose(1, 2)
