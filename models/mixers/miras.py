"""Miras (arXiv 2504.13173): a memory of each head that learns online, from the keys and values of the tokens, by gradient descent on a loss and
under a retention. Moneta, Yaad and Memora are rows of its table, and so are older ones:

| row | memory | loss | retention |
|---|---|---|---|
| linear attention | matrix | dot | none |
| DeltaNet; Gated DeltaNet | matrix | l2 | none; decay |
| Moneta | mlp | lp, p 3 | lq, q 4 |
| Yaad | mlp | huber | decay |
| Memora | mlp | l2 | kl |

A memory is A = first weights (learned; of a matrix none) + what was written. Of a token: what was written decays; the gradient is taken at W(A), the
memory that is left; what is written moves against it; the query is read at the new W(A). With a matrix, l2 and decay this is Gated DeltaNet to the
letter. Other than in the paper, the first weights of an MLP do not decay (its norm would be over nothing), and gate, step size and Huber
threshold are numbers of a head and token, not of a channel. The norm |A|_q is of the mean of powers, not of their sum: summed over a matrix it holds
all weights so small that the MLP's norm enlarges them, and every inner gradient, by hundreds. And a slope of l_p is at most the error itself, where
l_p's would be steeper, so that a step cannot carry further than what it corrects. Plain torch, token by token.

Legend: B batch, T time, H heads, K width of keys and values, M width inside an MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import linear
from kernels.short_conv import joint_gradient
from models.contract import Role, SequenceMixer
from models.init import draw_step_sizes_, init_matrix, norm_eps_problems, normal_, step_size_problems, tag
from models.layers import CausalConv, RMSNorm
from models.segments import document_starts, last_segment

SMOOTH = 1e-6  # added to squared errors under the root of an l_p loss, whose power may have no value at zero
CHOICES = {"memory": ("matrix", "mlp"), "loss": ("dot", "l2", "huber", "lp"), "retention": ("none", "decay", "lq", "kl")}


@dataclass
class Config:
    memory: str = "matrix"  # matrix | mlp: k + LayerNorm(W1 gelu(W2 k)) with learned first weights
    loss: str = "l2"  # dot | l2 | huber (of each number, with a threshold that the token sets) | lp (where that is the flatter one: l2)
    retention: str = (
        "decay"  # none | decay | lq (W = A / |A|_q^(q-2), the norm a mean) | kl (W = softmax of A, row by row); the last two decay too
    )
    n_heads: int = 4
    head_dim: int = 0  # width of keys and values; 0: d_model / n_heads
    expand: int = 4  # M / K of an mlp
    p: float = 3.0  # of the loss lp
    q: float = 4.0  # of the retention lq
    chunk: int = 1  # gradients are taken at the memory as it was at the last multiple of so many tokens of the document, decayed
    d_conv: int = 4  # width of the short convolution
    dt_min: float = 0.001  # initial step sizes of the gate, log-uniform
    dt_max: float = 0.1
    norm_eps: float = 1e-5

    def problems(self, d_model: int) -> list[str]:
        problems = [
            f"{key} is {getattr(self, key)!r}; choose {', '.join(choices[:-1])} or {choices[-1]}."
            for key, choices in CHOICES.items()
            if getattr(self, key) not in choices
        ]
        if min(self.n_heads, self.expand, self.chunk) < 1 or self.head_dim < 0 or self.d_conv < 2:
            problems.append("n_heads, expand and chunk must be above zero, head_dim zero or more and d_conv above one.")
        elif not self.head_dim and d_model % self.n_heads:
            problems.append(f"d_model {d_model} is not divisible by n_heads {self.n_heads}; change one or set head_dim.")
        if not 1 < self.p <= 8:
            problems.append(f"p must be above 1 and at most 8, not {self.p}.")
        if not 2 <= self.q <= 16:
            problems.append(f"q must lie between 2 and 16, not {self.q}.")
        problems += step_size_problems(self.dt_min, self.dt_max)
        problems += norm_eps_problems(self.norm_eps)
        return problems


@dataclass
class State:
    """The last convolution inputs. In fp32 what was written since the document began: down (the matrix, or W1 of an MLP) and up (W2). With chunks the
    same as when the chunk began, the sum of the log gates since, and the token's place in the chunk. The segment of the last token (-1: none yet)."""

    conv_BWI: Tensor
    down_BHKM: Tensor
    up_BHMK: Tensor | None
    first_down_BHKM: Tensor | None
    first_up_BHMK: Tensor | None
    since_BH11: Tensor | None
    place_B1: Tensor | None
    segment_B: Tensor


class Mixer(SequenceMixer):
    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model, self.H = config, d_model, config.n_heads
        self.K = config.head_dim or d_model // config.n_heads
        self.deep, self.gated = config.memory == "mlp", config.retention != "none"
        self.inner, self.M = self.H * self.K, config.expand * self.K if self.deep else self.K
        after = self.H * (1 + self.gated + (config.loss == "huber"))  # columns: step sizes, gates, thresholds
        self.in_proj = nn.Linear(d_model, 4 * self.inner + after, bias=False)
        tag(self.in_proj.weight, splits=[*[self.inner] * 4, *[self.H] * (after // self.H)])  # output gate, q, k, v
        self.conv = CausalConv(3 * self.inner, config.d_conv, bias=False)
        if self.gated:
            self.dt_bias = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32")
            self.A_log = tag(nn.Parameter(torch.empty(self.H)), "no_decay", "keep_fp32", "log_decay_rate")
        if self.deep:
            self.down_HKM = tag(nn.Parameter(torch.empty(self.H, self.K, self.M)), "no_decay", "keep_fp32")
            self.up_HMK = tag(nn.Parameter(torch.empty(self.H, self.M, self.K)), "no_decay", "keep_fp32")
        self.norm = RMSNorm(self.K, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)
        tag(self.out_proj.weight, residual=True)

    def init_weights(self, std: float, n_layers: int) -> None:
        """As Gated DeltaNet; the first weights of an MLP so that both layers have values of about one, under a softmax normal."""
        init_matrix(self.in_proj.weight, std, n_layers)
        init_matrix(self.out_proj.weight, std, n_layers)
        self.conv.init_weights()
        self.norm.init_weights()
        if self.deep:
            normal_(self.down_HKM, 1.0 if self.config.retention == "kl" else self.M**-0.5)
            normal_(self.up_HMK, 1.0)  # a key's norm is one
        if self.gated:
            draw_step_sizes_(self.dt_bias, self.config.dt_min, self.config.dt_max, 1e-4)
            with torch.no_grad():
                self.A_log.copy_(torch.log((torch.rand(self.H) * 16).clamp(min=1e-3)))

    def state_roles(self) -> dict[str, Role]:
        return {**super().state_roles(), "conv_BWI": "history"}

    def why_not_split(self, T: int = 1 << 62) -> str:
        return "a memory that learns goes on through every token's nonlinear update, so ranks would have to wait for each other"

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        projected, inner = linear(x_BTD, self.in_proj), torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        starts = document_starts(segment_ids, None if state is None else state.segment_B)
        joint = joint_gradient(projected)
        z, qkv, after, history = self.conv(projected, self.inner, None if state is None else state.conv_BWI, starts, joint)
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k, v = (part.to(inner).unflatten(-1, (self.H, self.K))[..., None] for part in qkv.chunk(3, -1))
            q, k = (x * torch.rsqrt(x.square().sum(-2, keepdim=True) + 1e-6) for x in (q, k))
            rates = after.to(inner)[..., None, None].split(self.H, 2)
            eta = torch.sigmoid(rates[0]) / (self.M if self.deep else 1)  # a step of 1 / M moves an MLP's output about as far as its error
            decay = self._log_decay(rates[1]) if self.gated else None
            threshold = F.softplus(rates[-1]) if self.config.loss == "huber" else None
            walk = self.init_state(len(x_BTD), x_BTD.device, inner) if state is None else state
            memory, out = self._opened(walk, inner), [v[:, :0, ..., 0]]
            for t in range(x_BTD.shape[1]):
                if starts is not None:
                    memory = [torch.where(starts[:, t].view(-1, *[1] * (m.ndim - 1)), torch.zeros_like(m), m) for m in memory]
                limit = None if threshold is None else threshold[:, t]
                y, memory = self._token(memory, q[:, t], k[:, t], v[:, t], eta[:, t], None if decay is None else decay[:, t], limit)
                out.append(y[:, None, ..., 0])
            o = torch.cat(out, 1).flatten(2).to(projected.dtype) * self.K**-0.5
        o = self.norm(o, z, heads=self.H, norm_first=True, dtype=o.dtype, columns=(0, joint))
        y = linear(o, self.out_proj)
        return y, None if state is None else self._closed(history, memory, last_segment(segment_ids, state.segment_B))

    def _log_decay(self, rate: Tensor) -> Tensor:
        scale, bias = (p.to(rate.dtype)[:, None, None] for p in (self.A_log, self.dt_bias))
        return -torch.exp(scale) * F.softplus(rate + bias)

    def _token(
        self, memory: list[Tensor], q: Tensor, k: Tensor, v: Tensor, eta: Tensor, decay: Tensor | None, limit: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(what is read (B, H, K, 1), memory) of one token. memory: weights written; with chunks the same as when the chunk began, the sum of the log
        gates since and the place. q, k, v (B, H, K, 1); eta, decay, limit (B, H, 1, 1)."""
        n, rest = 1 + self.deep, []
        written = since = memory[:n]
        if decay is not None:
            written = since = [torch.exp(decay) * w for w in written]
        if self.config.chunk > 1:
            *first, gates, place = memory[n:]
            begins = (place % self.config.chunk == 0)[..., None, None]
            first = [torch.where(begins, now, then) for now, then in zip(memory[:n], first)]
            gates = torch.where(begins, torch.zeros_like(gates), gates) + (0.0 if decay is None else decay)
            since, rest = [torch.exp(gates) * w for w in first], [*first, gates, place + 1]
        slopes = miras_gradient(self._weights(since), k, v, self.config.loss, self.config.p, limit)
        written = [w - eta * slope for w, slope in zip(written, slopes)]
        return miras_read(self._weights(written), q)[-1], [*written, *rest]

    def _weights(self, written: list[Tensor]) -> list[Tensor]:
        """The memory's weights W: first weights and what was written, through the retention's map."""
        kind, q = self.config.retention, self.config.q
        if self.deep:
            written = [w + first.to(w.dtype) for w, first in zip(written, (self.down_HKM, self.up_HMK))]
        if kind == "kl":
            return [w.softmax(-1) for w in written]
        if kind == "lq":  # where the norm is below one W is A, so that an empty memory is none
            return [w / (1 + w.abs().pow(q).mean((-2, -1), keepdim=True)) ** ((q - 2) / q) for w in written]
        return written

    def _opened(self, state: State, inner: torch.dtype) -> list[Tensor]:
        parts = (state.down_BHKM, state.up_BHMK, state.first_down_BHKM, state.first_up_BHMK, state.since_BH11)
        return [*(part.to(inner) for part in parts if part is not None), *([] if state.place_B1 is None else [state.place_B1])]

    def _closed(self, history: Tensor, memory: list[Tensor], segment_B: Tensor) -> State:
        down, up = memory[0], memory[1] if self.deep else None
        if self.config.chunk == 1:
            return State(history, down, up, None, None, None, None, segment_B)
        first, since, place = memory[1 + self.deep : -2], memory[-2], memory[-1]
        return State(history, down, up, first[0], first[1] if self.deep else None, since, place % self.config.chunk, segment_B)

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        kind = dtype or self.in_proj.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, self.H, *shape, device=device, dtype=inner)

        walk = [zeros(self.K, self.M), *([zeros(self.M, self.K)] if self.deep else [])]
        if self.config.chunk > 1:
            walk += [*(torch.zeros_like(w) for w in walk), zeros(1, 1), torch.zeros(batch, 1, device=device, dtype=torch.int32)]
        history = self.conv.init_state(batch, device, kind)
        return self._closed(history, walk, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def flops_per_token(self, T: int) -> int:
        """Projections, convolution, and the memory: read at the key, its gradient, its update, read at the query."""
        products = 2 * self.d_model * (self.in_proj.out_features + self.inner) + 6 * self.config.d_conv * self.inner
        return products + self.inner * self.M * (2 * (7 if self.deep else 3))


def miras_read(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """What the memory makes of x (B, H, K, 1), last; before it, of an MLP, what its layers made: [W2 x, gelu of it, W1 of that, normed]."""
    if len(weights) == 1:
        return [weights[0] @ x]
    h = weights[1] @ x
    a = F.gelu(h)
    z = weights[0] @ a
    normed = F.layer_norm(z[..., 0], z.shape[-2:-1])[..., None]
    return [h, a, z, normed, x + normed]


def miras_gradient(weights: list[Tensor], k: Tensor, v: Tensor, loss: str, p: float, limit: Tensor | None) -> list[Tensor]:
    """Gradients of the loss between what the memory holds under k and v (B, H, K, 1), for each of its weights; without the factor p
    of the powers, which is the step size's. lp: min(|e|, |e|^(p-1)), with the error's sign."""
    made = miras_read(weights, k)
    error = made[-1] - v
    if loss == "dot":
        slope = -v
    elif loss == "huber":
        assert limit is not None
        slope = torch.maximum(torch.minimum(error, limit), -limit)
    else:
        slope = error * ((error.square() + SMOOTH) ** (p / 2 - 1)).clamp(max=1.0) if loss == "lp" else error
    if len(weights) == 1:
        return [slope * k.mT]
    h, a, z, normed, _ = made
    centred = slope - slope.mean(-2, keepdim=True) - normed * (slope * normed).mean(-2, keepdim=True)
    d_z = centred * torch.rsqrt(z.var(-2, keepdim=True, correction=0) + 1e-5)  # F.layer_norm's own eps
    d_h = (weights[0].mT @ d_z) * (0.5 * (1 + torch.erf(h / math.sqrt(2))) + h * torch.exp(-0.5 * h.square()) / math.sqrt(2 * math.pi))
    return [d_z * a.mT, d_h * k.mT]
