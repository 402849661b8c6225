"""A recurrence as a dynamical system: how far back it reaches, through how many directions, and what it makes of a sequence.

Every linear mixer is S_t = S_{t-1} Lambda_t + sum_r u_tr B_tr^T, y_t = S_t C_t for each head (Sieber et al., "Understanding the differences in
foundation models", arXiv 2405.15731), and so y = M u with one T x T matrix M a head. Of a nonlinear one Lambda_t is its Jacobian.
evals/dynamics.py takes these from a model. Legend: B rows, T time, H heads (or channels), N width that Lambda acts on, P values, R writes a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.contract import SequenceMixer

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
MIXED = 32  # heads or channels at most, evenly chosen, of which mixing matrices are made
TOLERANCE = 1e-4  # of outputs rebuilt from (Lambda, B, C), relative to the largest of them


@dataclass
class Recurrence:
    """Lambda (B, T, H, N, N), or (B, T, H) where it is a number times the identity; B (B, T, H, R, N), u (B, T, H, R, P), C (B, T, H, N) and what
    the mixer gave, y (B, T, H, P): None of a nonlinear one. size: numbers in the state of all heads."""

    Lambda: Tensor
    size: int
    B: Tensor | None = None
    u: Tensor | None = None
    C: Tensor | None = None
    y: Tensor | None = None

    @property
    def width(self) -> int:
        """N: what one number that comes in is expanded to."""
        return self.C.shape[-1] if self.C is not None else self.Lambda.shape[-1] if self.Lambda.ndim == 5 else 1

    def advanced(self, rows: Tensor, t: int) -> Tensor:
        """rows (B, H, X, N) times Lambda_t."""
        here = self.Lambda[:, t]
        return rows @ here if self.Lambda.ndim == 5 else rows * here[..., None, None]

    def some(self, most: int) -> Recurrence:
        """The same of at most so many heads."""
        chosen = torch.arange(0, H := self.Lambda.shape[2], -(-H // most), device=self.Lambda.device)
        return Recurrence(
            self.Lambda[:, :, chosen], self.size, *(None if x is None else x[:, :, chosen] for x in (self.B, self.u, self.C, self.y))
        )


def rebuilt(r: Recurrence) -> Tensor:
    """y (B, T, H, P) of the recurrence walked step by step from nothing."""
    assert r.B is not None and r.u is not None and r.C is not None
    S = r.u.new_zeros(*r.u.shape[:1], r.u.shape[2], r.u.shape[-1], r.width)
    y = []
    for t in range(r.u.shape[1]):
        S = r.advanced(S, t) + r.u[:, t].transpose(-1, -2) @ r.B[:, t]
        y.append((S @ r.C[:, t, :, :, None])[..., 0])
    return torch.stack(y, 1)


def rebuild_error(r: Recurrence) -> float:
    """The largest difference between y and what (Lambda, B, C) give, over the largest entry of y."""
    assert r.y is not None
    return float((rebuilt(r) - r.y).abs().max() / r.y.abs().max().clamp(min=1e-30))


def mixing_matrix(r: Recurrence) -> Tensor:
    """M (B, H, T, T): the norm over r of C_t (Lambda_{j+1} .. Lambda_t) B_jr, signed where R is 1; zero above the diagonal."""
    assert r.B is not None and r.C is not None
    B, T, H, R, N = r.B.shape
    reached = r.B.new_zeros(B, H, T * R, N)  # B_j as it has come to step t
    rows = []
    for t in range(T):
        reached[:, :, : t * R] = r.advanced(reached[:, :, : t * R], t)
        reached[:, :, t * R : (t + 1) * R] = r.B[:, t]
        row = (reached @ r.C[:, t, :, :, None])[..., 0].unflatten(-1, (T, R))
        rows.append(row[..., 0] if R == 1 else row.norm(dim=-1))
    return torch.stack(rows, 2)


def gains(r: Recurrence) -> Tensor:
    """(H, W): how much of a state is left after 1 .. W = T / 2 steps, the root mean square over directions, rows and eight places to begin."""
    (B, T, H), N, W = r.Lambda.shape[:3], r.width, r.Lambda.shape[1] // 2
    curves = []
    for first in range(0, T - W, max(1, (T - W) // 8)):
        product = torch.eye(N, dtype=r.Lambda.dtype, device=r.Lambda.device).expand(B, H, N, N)
        if r.Lambda.ndim == 3:
            curves.append(r.Lambda[:, first + 1 : first + 1 + W].cumprod(1).square().mean(0).T)
            continue
        curve = []
        for t in range(first + 1, first + 1 + W):
            product = r.advanced(product, t)
            curve.append(product.square().sum((-1, -2)).mean(0) / N)
        curves.append(torch.stack(curve, 1))
    return torch.stack(curves).mean(0).sqrt()


def memory_length(curve: Tensor) -> float | None:
    """Steps after which 1/e is left of a state, between those of a curve of `gains`; continued at its mean rate where the curve ends before.
    None: nothing is lost (or the state grows)."""
    values = [1.0, *curve.tolist()]
    for lag in range(1, len(values)):
        if values[lag] < math.exp(-1):
            high, low = math.log(max(values[lag - 1], 1e-300)), math.log(max(values[lag], 1e-300))
            return lag - 1 + (high + 1) / max(high - low, 1e-300)
    last = math.log(max(values[-1], 1e-300)) / (len(values) - 1)
    return None if last > -1e-7 else -1 / last


def spectral_radii(r: Recurrence) -> Tensor:
    """(B, T, H): the largest absolute eigenvalue of every Lambda."""
    return r.Lambda.abs() if r.Lambda.ndim == 3 else torch.linalg.eigvals(r.Lambda).abs().amax(-1)


def _quantiles(x: Tensor) -> list[float]:
    return torch.quantile(x.double().flatten()[: 1 << 20], x.new_tensor(QUANTILES, dtype=torch.float64)).tolist()


def _memories(curves: Tensor) -> dict[str, Any]:
    lengths = [memory_length(curve) for curve in curves]
    finite = sorted(math.inf if length is None else length for length in lengths)
    shown = [finite[round(q * (len(finite) - 1))] for q in QUANTILES]
    return {"memory": [None if length == math.inf else length for length in shown], "never_forgets": sum(v is None for v in lengths)}


def effective_rank(M: Tensor) -> Tensor:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007), of the last two dimensions."""
    values = torch.linalg.svdvals(M)
    p = values / values.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.exp(-(p * p.clamp(min=1e-30).log()).sum(-1))


def mixing_figures(M: Tensor) -> dict[str, Any]:
    """Of M (B, H, T, T): effective rank, and the share of the first token in what the second half of the sequence reads."""
    weight = M[..., M.shape[-2] // 2 :, :].abs()
    first = weight[..., 0] / weight.sum(-1).clamp(min=1e-30)
    return {"mixing_rank": float(effective_rank(M).mean()), "first_token": float(first.mean())}


def coupling(r: Recurrence, radii: Tensor) -> float | None:
    """The correlation over time of how much is forgotten and how much is written, 1 - |Lambda_t| and |B_t|, a mean over heads and rows; None where
    one of them is constant."""
    assert r.B is not None
    both = torch.stack([1 - radii, r.B.square().sum((-1, -2)).sqrt()])
    both = both - both.mean(2, keepdim=True)
    scale = both.square().sum(2).sqrt()
    varies = (scale > 1e-9).all(0)
    if not bool(varies.any()):
        return None
    return float(((both[0] * both[1]).sum(1) / scale.prod(0).clamp(min=1e-30))[varies].mean())


def figures(r: Recurrence) -> dict[str, Any]:
    """All that the report says of one recurrence. memory and radius are quantiles (QUANTILES) over heads, and over heads, rows and time."""
    radii = spectral_radii(r)
    row: dict[str, Any] = {
        "heads": r.Lambda.shape[2],
        "size": r.size,
        "expansion": r.width,
        "radius": _quantiles(radii),
        **_memories(gains(r)),
    }
    if r.C is None:
        return row
    return {**row, "rebuild_error": rebuild_error(r), "coupling": coupling(r, radii), **mixing_figures(mixing_matrix(r.some(MIXED)))}


def probed(mixer: SequenceMixer, x_BTD: Tensor, seed: int = 0) -> dict[str, Any]:
    """What the contract alone says of any mixer with a state of fixed size: one memory for all of the state, from random directions carried back
    through the Jacobians of T steps, the spectral radius at eight of them by the power method, and whether the state enters linearly: then its
    outputs are rebuilt too (`walked`).

    x (B, T, D): the mixer's inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    T, taken, states = x_BTD.shape[1], [], list[Any]()
    state = mixer.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype)
    with torch.enable_grad():
        for t in range(T):
            states.append(state)
            before = {n: v.detach().requires_grad_() for n, v in mixer.tensors_of(state, "recurrent").items()}
            _, state = mixer(x_BTD[:, t : t + 1], replace(state, **before))
            taken.append((list(before.values()), list(mixer.tensors_of(state, "recurrent").values())))
            state = replace(state, **{n: v.detach() for n, v in mixer.tensors_of(state, "recurrent").items()})

        def back(t: int, probe: list[Tensor]) -> list[Tensor]:
            past = torch.autograd.grad(taken[t][1], taken[t][0], probe, retain_graph=True, allow_unused=True)
            return [torch.zeros_like(b) if g is None else g for g, b in zip(past, taken[t][0])]

        def draw() -> list[Tensor]:
            return [torch.randn(v.shape, generator=generator).to(v) for v in taken[-1][1]]

        probe, curve = draw(), []
        start = _norm(probe)
        for t in range(T - 1, T - 1 - T // 2, -1):
            probe = back(t, probe)
            curve.append((_norm(probe) / start).square().mean().sqrt())
        radii = [_power(partial(back, t), draw()) for t in range(T // 2, T, max(1, T // 16))]
    size = sum(v[0].numel() for v in taken[-1][1])
    error = walked(mixer, x_BTD, states)
    linear: dict[str, Any] = {"linear": error < TOLERANCE}
    return {
        "heads": 1,
        "size": size,
        "expansion": None,
        "radius": _quantiles(torch.cat(radii)),
        **(linear | {"rebuild_error": error} if linear["linear"] else linear),
        **_memories(torch.stack(curve)[None]),
    }


def _norm(parts: list[Tensor]) -> Tensor:
    return sum(p.double().flatten(1).square().sum(1) for p in parts).sqrt()  # type: ignore[union-attr,return-value]


def _power(step: Callable[[list[Tensor]], list[Tensor]], probe: list[Tensor], iterations: int = 24) -> Tensor:
    """(B,): the rate at which the last half of the iterations grow a probe."""
    total = torch.zeros_like(_norm(probe))
    for i in range(iterations):
        norm = _norm(probe).clamp(min=1e-300)
        scaled = [p / norm.to(p.dtype).view(-1, *[1] * (p.ndim - 1)) for p in probe]
        probe = step(scaled)
        total += _norm(probe).clamp(min=1e-300).log() if i >= iterations // 2 else 0
    return (total / (iterations - iterations // 2)).exp()


@torch.no_grad()
def walked(mixer: SequenceMixer, x_BTD: Tensor, states: list[Any]) -> float:
    """How far the outputs of a whole sequence are from those of a walk that takes every step for Lambda_t s + w_t, over the largest of them.

    w is what a step makes of an empty state, and Lambda s what it makes of twice s more than of s, which a step that is not linear does not
    satisfy. states: those before each step, of which the walk takes what is not recurrent (histories of convolutions).
    """
    s = mixer.tensors_of(states[0], "recurrent")
    nothing = {name: torch.zeros_like(value) for name, value in s.items()}
    outputs = []
    for t, state in enumerate(states):

        def step(recurrent: dict[str, Tensor], t: int = t, state: Any = state) -> tuple[Tensor, dict[str, Tensor]]:
            y, after = mixer(x_BTD[:, t : t + 1], replace(state, **recurrent))
            return y, mixer.tensors_of(after, "recurrent")

        y, once = step(s)
        twice, written = step({name: 2 * value for name, value in s.items()})[1], step(nothing)[1]
        outputs.append(y)
        s = {name: twice[name] - once[name] + written[name] for name in s}
    whole = mixer(x_BTD, mixer.init_state(len(x_BTD), x_BTD.device, x_BTD.dtype))[0]
    error = float((torch.cat(outputs, 1) - whole).abs().max() / whole.abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")
