"""State spaces whose matrices do not depend on the token: S4D (arXiv 2206.11893), S5 (2208.04933) and the dense LSSL (2110.13985).

x' = A x + B u, y = C x + D u, sampled with a learned step. One recurrence, read in chunks: inside a chunk it is a short convolution, between chunks the
state goes on, so a row may hold documents and end anywhere. GELU, a linear map and a GLU behind it, as published.

| kind | state | A |
|---|---|---|
| s4d | d_state numbers for each channel | diagonal, complex pairs |
| s5 | d_state numbers for the layer | diagonal, complex pairs; B and C mix the channels |
| lssl | d_state numbers for each channel | dense, one for all channels; the reference |

Legend: B batch, T time, D channels, N d_state, P = N / 2 complex pairs, C chunks, Q steps of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import linear
from models.contract import SequenceMixer
from models.init import init_matrix, step_size_problems, tag
from models.segments import document_starts, last_segment

LTI_CHUNK = 16  # Q: a token costs Q products in the convolution and N / Q numbers of state
LTI_IMPLICIT = {
    "bilinear": 0.5,
    "backward": 1.0,
}  # share of the new state in the slope that a step is taken with (generalised bilinear rule)


@dataclass
class Config:
    kind: str = "s4d"  # s4d | s5 | lssl
    d_state: int = 64  # N
    init: str = "lin"  # frequencies of s4d: lin (pi n) | inv (those of an exponentially warped past) | real (none)
    blocks: int = 1  # s5: A starts as so many blocks of HiPPO-N
    discretization: str = "zoh"  # zoh | bilinear | backward (Euler)
    dt_min: float = 0.001  # initial step sizes, log-uniform
    dt_max: float = 0.1
    dt_scale: float = 1.0  # all step sizes times this: 2 for input that is sampled half as often as in training

    def problems(self, d_model: int) -> list[str]:
        problems = []
        if self.kind not in ("s4d", "s5", "lssl"):
            problems.append(f"kind is {self.kind!r}; choose s4d, s5 or lssl.")
        if self.init not in ("lin", "inv", "real"):
            problems.append(f"init is {self.init!r}; choose lin, inv or real.")
        if self.discretization not in ("zoh", *LTI_IMPLICIT):
            problems.append(f"discretization is {self.discretization!r}; choose zoh, bilinear or backward.")
        if self.d_state < 2 or self.d_state % 2:
            problems.append(f"d_state must be an even number above zero, not {self.d_state}.")
        elif self.blocks < 1 or self.d_state % (2 * self.blocks):
            problems.append(f"d_state {self.d_state} must be divisible by twice the blocks, {self.blocks}.")
        problems += step_size_problems(self.dt_min, self.dt_max)
        if not 0 < self.dt_scale <= 1000:
            problems.append(f"dt_scale must be above zero and at most 1000, not {self.dt_scale}.")
        return problems


@dataclass
class State:
    """The states in fp32: (B, D, N), of s5 (B, 1, N), real parts first; and the segment of the last token (-1: none yet)."""

    x_BDN: Tensor
    segment_B: Tensor


class Mixer(SequenceMixer):
    def __init__(self, config: Config, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.d_model, self.N = config, d_model, config.d_state
        D, N, P = d_model, self.N, self.N // 2

        def own(*shape: int) -> nn.Parameter:
            return tag(nn.Parameter(torch.empty(*shape)), "no_decay", "keep_fp32")

        self.D = own(D)
        self.log_dt = own(P if config.kind == "s5" else D)
        if config.kind == "lssl":
            self.A_NN, self.B_N, self.C_DN = own(N, N), own(N), own(D, N)
        elif config.kind == "s4d":
            self.A_log, self.A_im, self.C_DP2 = own(D, P), own(D, P), own(D, P, 2)
        else:
            self.A_log, self.A_im = own(P), own(P)
            self.B_proj, self.C_proj = nn.Linear(D, N, bias=False), nn.Linear(N, D, bias=False)
            tag(self.B_proj.weight, splits=[P, P])
        self.out_proj = nn.Linear(D, 2 * D, bias=False)
        tag(self.out_proj.weight, residual=True, splits=[D, D])

    def init_weights(self, std: float, n_layers: int) -> None:
        """As published: step sizes log-uniform; A of HiPPO, or what S4D makes of it; C normal; D normal."""
        c, D, N, P = self.config, self.d_model, self.N, self.N // 2
        init_matrix(self.out_proj.weight, std, n_layers)
        low, high = math.log(c.dt_min), math.log(c.dt_max)
        with torch.no_grad():
            self.D.copy_(torch.randn(D))
            self.log_dt.copy_(torch.rand(len(self.log_dt)) * (high - low) + low)
            if c.kind == "lssl":
                A, B = hippo(N)
                self.A_NN.copy_(A)
                self.B_N.copy_(B)
                self.C_DN.copy_(torch.randn(D, N) * N**-0.5)
            elif c.kind == "s4d":
                n = torch.arange(P, dtype=torch.float64)
                im = {"lin": math.pi * n, "inv": N / math.pi * (N / (2 * n + 1) - 1), "real": torch.zeros(P)}[c.init]
                self.A_im.copy_(im.expand(D, P))
                self.A_log.copy_(torch.log(1.0 + n if c.init == "real" else torch.full((P,), 0.5)).expand(D, P))
                self.C_DP2.copy_(torch.randn(D, P, 2) * 0.5**0.5)
            else:
                A_P, V = diagonal_hippo(N // c.blocks)
                self.A_log.copy_(torch.log(-A_P.real).repeat(c.blocks))
                self.A_im.copy_(A_P.imag.repeat(c.blocks))
                V = torch.block_diag(*[V] * c.blocks)
                B = V.mH @ torch.randn(N, D).to(V.dtype) * D**-0.5
                C = torch.randn(D, N).to(V.dtype) @ V * N**-0.5
                self.B_proj.weight.copy_(torch.cat([B.real, B.imag]))
                self.C_proj.weight.copy_(torch.cat([2 * C.real, -2 * C.imag], 1))

    def why_not_split(self, T: int = 1 << 62) -> str:
        return "the state of an LTI layer goes on through complex or dense powers, for which no exchange between ranks is written"

    def forward(self, x_BTD: Tensor, state: State | None = None, segment_ids: Tensor | None = None) -> tuple[Tensor, State | None]:
        starts = document_starts(segment_ids, None if state is None else state.segment_B)
        y, after = self.read(x_BTD, None if state is None else state.x_BDN, starts)
        y = F.glu(linear(F.gelu(y), self.out_proj), -1)
        return y, None if state is None else State(after, last_segment(segment_ids, state.segment_B))

    def read(self, x_BTD: Tensor, before: Tensor | None = None, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(what the state space alone, which is linear, makes of x; the last state)."""
        inner, mixed = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32, self.config.kind == "s5"
        u = linear(x_BTD, self.B_proj) if mixed else x_BTD
        with torch.autocast(x_BTD.device.type, enabled=False):
            if before is None:
                before = torch.zeros(len(u), 1 if mixed else self.d_model, self.N, device=u.device, dtype=inner)
            y, after = (self._pairs if mixed else self._channels)(u.to(inner), before.to(inner), starts)
        if mixed:
            y = linear(y.to(u.dtype), self.C_proj).to(inner)
        return (y + self.D.to(inner) * x_BTD.to(inner)).to(u.dtype), after

    def steps(self) -> Tensor:
        """The step sizes of the channels, of s5 of the pairs, in fp64."""
        return torch.exp(self.log_dt.double()) * self.config.dt_scale

    def sampled(self) -> tuple[Tensor, Tensor]:
        """(log of the sampled A, sampled B) of diagonal kinds, complex: (D, P), of s5 (P,) and for an input of one."""
        A = torch.complex(-torch.exp(self.A_log.double()), self.A_im.double())
        dt = self.steps() if self.config.kind == "s5" else self.steps()[:, None]
        if self.config.discretization == "zoh":
            return dt * A, torch.expm1(dt * A) / A
        share = LTI_IMPLICIT[self.config.discretization]
        below = 1 - share * dt * A
        return torch.log((1 + (1 - share) * dt * A) / below), dt / below

    def sampled_dense(self) -> tuple[Tensor, Tensor]:
        """(sampled A (D, N, N), sampled B (D, N)) of lssl, in fp64."""
        dt_D11, A, eye = self.steps()[:, None, None], self.A_NN.double(), torch.eye(self.N, dtype=torch.float64, device=self.A_NN.device)
        B_N1 = self.B_N.double()[:, None]
        if self.config.discretization == "zoh":
            whole = torch.matrix_exp(dt_D11 * F.pad(torch.cat([A, B_N1], 1), (0, 0, 0, 1)))
            return whole[:, :-1, :-1], whole[:, :-1, -1]
        share = LTI_IMPLICIT[self.config.discretization]
        right = torch.cat([eye + (1 - share) * dt_D11 * A, dt_D11 * B_N1], 2)
        both = torch.linalg.solve_ex(eye - share * dt_D11 * A, right).result  # which does not wait for the device to be checked
        return both[..., :-1], both[..., -1]

    def tables(self, Q: int) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor, int], Tensor]]:
        """(the kernel (D, Q); what state Q tokens later read of it (D, Q, N); powers of A times B (D, Q, N); a state (B, D, N) so many steps later)."""
        if self.config.kind == "s4d":
            log_A, B = self.sampled()
            powers = torch.exp(log_A[:, None] * torch.arange(Q + 1, device=log_A.device)[:, None])
            C = torch.view_as_complex(self.C_DP2.double())[:, None]
            reads, inputs = 2 * C * powers[:, 1:], powers[:, :-1] * B[:, None]
            kernel_DQ = (2 * C * inputs).sum(-1).real

            def later(x_BDN: Tensor, q: int) -> Tensor:
                re, im = x_BDN.chunk(2, -1)
                a = powers[:, q].to(torch.complex128 if x_BDN.dtype == torch.float64 else torch.complex64)
                return torch.cat([re * a.real - im * a.imag, re * a.imag + im * a.real], -1)

            return kernel_DQ, torch.cat([reads.real, -reads.imag], -1), torch.cat([inputs.real, inputs.imag], -1), later
        A, B = self.sampled_dense()
        column, row, columns, rows = B, self.C_DN.double(), [], []
        for _ in range(Q):
            columns.append(column)
            column, row = (A @ column[..., None])[..., 0], (row[:, None] @ A)[:, 0]
            rows.append(row)
        inputs = torch.stack(columns, 1)

        def dense(x_BDN: Tensor, q: int) -> Tensor:
            return torch.einsum("dmn,bdn->bdm", torch.linalg.matrix_power(A, q).to(x_BDN.dtype), x_BDN)

        return (self.C_DN.double()[:, None] * inputs).sum(-1), torch.stack(rows, 1), inputs, dense

    def _channels(self, u_BTD: Tensor, x_BDN: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """(outputs without the skip, last state): whole chunks, then what is left of the row."""
        T = u_BTD.shape[1]
        Q = max(1, min(LTI_CHUNK, T))
        kernel, reads, inputs, later = self.tables(Q)
        tables = (kernel.to(u_BTD.dtype), reads.to(u_BTD.dtype), inputs.to(u_BTD.dtype), later)
        out, whole = [u_BTD[:, :0]], T - T % Q
        for part, q in ((slice(0, whole), Q), (slice(whole, T), T % Q)):
            if part.stop > part.start:
                y, x_BDN = lti_chunks(u_BTD[:, part], x_BDN, None if starts is None else starts[:, part], q, tables)
                out.append(y)
        return torch.cat(out, 1), x_BDN

    def _pairs(self, u_BTN: Tensor, x_B1N: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """s5: all states (B, T, N), real parts first, by steps of doubling length; and the last."""
        kind = torch.complex128 if u_BTN.dtype == torch.float64 else torch.complex64
        log_A, B_P = self.sampled()
        h = torch.complex(*u_BTN.chunk(2, -1)) * B_P.to(kind)
        if not h.shape[1]:
            return u_BTN, x_B1N
        document_BT = torch.zeros_like(u_BTN[..., 0], dtype=torch.int32) if starts is None else starts.int().cumsum(1)
        carried = torch.complex(*x_B1N.chunk(2, -1)) * torch.exp(log_A).to(kind)
        carried = torch.where((document_BT[:, :1] == 0)[..., None], carried, 0.0)
        h, by = torch.cat([h[:, :1] + carried, h[:, 1:]], 1), 1
        while by < h.shape[1]:
            same = (document_BT[:, by:] == document_BT[:, :-by])[..., None]
            came = torch.where(same, torch.exp(by * log_A).to(kind) * h[:, :-by], 0.0)
            h, by = torch.cat([h[:, :by], h[:, by:] + came], 1), 2 * by
        states = torch.cat([h.real, h.imag], -1)
        return states, states[:, -1:]

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        kind = dtype or self.out_proj.weight.dtype
        inner = torch.float64 if kind == torch.float64 else torch.float32
        x = torch.zeros(batch, 1 if self.config.kind == "s5" else self.d_model, self.N, device=device, dtype=inner)
        return State(x, torch.full((batch,), -1, device=device, dtype=torch.int32))

    def flops_per_token(self, T: int) -> int:
        """Projections; of the recurrence what the chunks do: a convolution, and the state written, moved on and read."""
        D, N = self.d_model, self.N
        if self.config.kind == "s5":
            return 2 * D * 2 * D + 4 * D * N + 4 * N
        moved = 2 * N * N if self.config.kind == "lssl" else 4 * N
        return 2 * D * 2 * D + D * (2 * LTI_CHUNK + 4 * N + moved // LTI_CHUNK)


def lti_chunks(
    u_BTD: Tensor, x_BDN: Tensor, starts: Tensor | None, Q: int, tables: tuple[Tensor, Tensor, Tensor, Callable[[Tensor, int], Tensor]]
) -> tuple[Tensor, Tensor]:
    """(outputs (B, T, D), state after them) of T = C Q tokens. A document start hides what lies before it from all that come after."""
    kernel_DQ, reads_DQN, inputs_DQN, later = tables
    u = u_BTD.unflatten(1, (-1, Q))
    document = None if starts is None else starts.unflatten(1, (-1, Q)).int().cumsum(2)[..., None]
    y = kernel_DQ[:, 0] * u
    for lag in range(1, Q):
        came = kernel_DQ[:, lag] * u[:, :, :-lag]
        if document is not None:
            came = torch.where(document[:, :, lag:] == document[:, :, :-lag], came, 0.0)
        y = torch.cat([y[:, :, :lag], y[:, :, lag:] + came], 2)
    last = u if document is None else torch.where(document == document[:, :, -1:], u, 0.0)
    added = torch.einsum("bcjd,djn->bcdn", last, inputs_DQN[:, :Q].flip(1))
    before = []
    for c in range(u.shape[1]):
        before.append(x_BDN)
        x_BDN = later(x_BDN, Q)
        if document is not None:
            x_BDN = torch.where(document[:, c, -1:] == 0, x_BDN, 0.0)
        x_BDN = x_BDN + added[:, c]
    read = torch.einsum("bcdn,din->bcid", torch.stack(before, 1), reads_DQN[:, :Q])
    y = y + (read if document is None else torch.where(document == 0, read, 0.0))
    return y.flatten(1, 2), x_BDN


def hippo(N: int) -> tuple[Tensor, Tensor]:
    """(A (N, N), B (N,)) of HiPPO-LegS in fp64: what keeps Legendre coefficients of the whole past."""
    n = torch.arange(N, dtype=torch.float64)
    roots = torch.sqrt(2 * n + 1)
    return -(torch.tril(roots[:, None] * roots, -1) + torch.diag(n + 1)), roots


def diagonal_hippo(N: int) -> tuple[Tensor, Tensor]:
    """(eigenvalues (N / 2,), eigenvectors (N, N / 2)) of HiPPO-N, the normal part of LegS, with frequencies above zero."""
    A, _ = hippo(N)
    low_rank = torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)
    skew = A + low_rank[:, None] * low_rank + 0.5 * torch.eye(N, dtype=torch.float64)
    frequencies, V = torch.linalg.eigh(-1j * skew)
    return torch.complex(torch.full((N // 2,), -0.5, dtype=torch.float64), frequencies[N // 2 :]), V[:, N // 2 :]
