"""The few states near which each head's states lie, where it behaves as an automaton, and whether composing maps between them pays (automata.py).

Legend: as in reference.py; M candidates, R states met; dictionaries are (E, M, S, K).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SETTLE = 8  # last steps of the slice before, over which a candidate is walked before it is one
OVERHEAD = (
    1600  # steps of a walk (0.5 us) that take as long as all launches that do not walk: 0.8 ms as called on an H200, half of it in a graph
)
ROWS, SHORTEST = 16, 64  # of a program; steps in which heads forget where in a basin they started


class Dictionary(nn.Module):
    """The few states of each head, as buffers: part of a state dict. states (E, M, S, K); spread (E), in shares of a channel's size."""

    states: Tensor
    spread: Tensor

    def __init__(self, heads: int, candidates: int, states: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(heads, candidates, states, channels))
        self.register_buffer("spread", torch.full((heads,), torch.inf))

    @torch.no_grad()
    def learn(self, borders_RSD: Tensor) -> None:
        """Takes those of R states met at borders that lie farthest from each other, the first one to begin with, each head for itself."""
        E, M, S, K = self.states.shape
        seen = by_head(borders_RSD.float(), E)  # (R, E, S K)
        far = (seen / scale_of(seen.transpose(0, 1))).transpose(0, 1)
        chosen = torch.zeros(E, M, dtype=torch.long, device=far.device)
        nearest = torch.full(far.shape[:2], torch.inf, device=far.device)
        for m in range(M):
            if m:
                chosen[:, m] = nearest.argmax(1)
            picked = far.gather(1, chosen[:, m, None, None].expand(-1, 1, far.shape[2]))
            nearest = torch.minimum(nearest, (far - picked).abs().amax(2))
        picked = seen.transpose(0, 1).gather(1, chosen[..., None].expand(-1, -1, S * K))
        self.states.copy_(picked.unflatten(2, (S, K)))
        self.spread.copy_(nearest.amax(1))

    @torch.no_grad()
    def reach(self, met_RSD: Tensor, most: float) -> float:
        """Distance within which this share of R states of every head has a candidate: root mean square of shares of channels' sizes."""
        E = self.states.shape[0]
        met = by_head(met_RSD.float(), E).transpose(0, 1)
        scale = scale_of(met)[:, None]
        nearest = distances(met / scale, self.states.flatten(2) / scale).amin(2)
        return float((nearest / met.shape[2] ** 0.5).quantile(most, 1).amax())


def distances(a: Tensor, b: Tensor) -> Tensor:
    """(.., M, N) of (.., M, F) and (.., N, F), by a product: without one a GPU gives each of the distances a block of threads."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def by_head(x: Tensor, E: int) -> Tensor:
    """(..., S, D) as (..., E, S K)."""
    return x.unflatten(-1, (E, -1)).transpose(-3, -2).flatten(-2)


def by_channel(x: Tensor, S: int) -> Tensor:
    """(..., E, S K) as (..., S, D)."""
    return x.unflatten(-1, (S, -1)).transpose(-3, -2).flatten(-2)


def scale_of(states_EMF: Tensor) -> Tensor:
    """(E, F): the largest absolute value of each channel."""
    return states_EMF.abs().amax(1).clamp_min(1e-30)


def slices_for(B: int, T: int, E: int, M: int, programs: int, settle: int = SETTLE, repeats: int = 1, shortest: int | None = None) -> int:
    """Slices that `forward` takes least time over, or 1 where the walk in order is faster; reckoned in steps of a walk. programs: those that run
    side by side, some for each multiprocessor. shortest: steps in which the heads forget where in a basin they started."""

    def waves(rows: int) -> int:
        return -(-E * -(-rows // ROWS) // programs)

    best, least = 1, T * waves(B)
    for k in range(2, 13):
        n = 1 << k
        if T // n < max(shortest or SHORTEST, settle):
            break
        length = -(-T // n)
        each = B * waves(M * n)  # batch rows one after the other
        cost = OVERHEAD * B + each * (settle + length) + (1 + repeats) * waves(B * n) * length
        best, least = (n, cost) if cost < least else (best, least)
    return best
