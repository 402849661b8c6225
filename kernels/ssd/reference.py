"""Mamba-2's scan in plain torch: the recurrence itself as the oracle, and the chunked form (matrix products inside chunks of Q steps).

Legend: B batch, T time, H heads, P head width, G groups, N state width, C chunks, Q steps of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LONGEST = 64  # steps of a chunk beyond which its matrices take a CPU longer than they save


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _skipped(y: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    return y if D is None else y + x.to(y.dtype) * D.to(y.dtype)[:, None]


def ssd_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    h0: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one step at a time, in the inputs' dtype."""
    B, T, H, P = x.shape
    repeat = H // Bm.shape[2]
    h = x.new_zeros(B, H, P, Bm.shape[-1]) if h0 is None else h0
    out = []
    for t in range(T):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], 0.0, h)
        b, c = Bm[:, t].repeat_interleave(repeat, 1), Cm[:, t].repeat_interleave(repeat, 1)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, :, None]
        out.append((h * c[:, :, None]).sum(-1))
    y = torch.stack(out, 1) if out else torch.zeros_like(x)
    return y if D is None else y + x * D[:, None], h


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, starts: Tensor | None, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step (T = 1) of the recurrence, heads grouped rather than B and C repeated; h0 is left as it is."""
    dtype, (B, _, H, P), (G, N) = _inner(x.dtype), x.shape, Bm.shape[2:]
    dt_BH = dt[:, 0].to(dtype)
    decay_BH = torch.exp(dt_BH * A.to(dtype))
    added = dt_BH[..., None] * x[:, 0].to(dtype)
    decayed = h0.to(dtype) * decay_BH[..., None, None]
    if starts is not None:
        decayed = torch.where(starts[..., None, None], 0.0, decayed)
    h = torch.addcmul(decayed.reshape(B, G, H // G * P, N), added.view(B, G, H // G * P, 1), Bm[:, 0, :, None].to(dtype))
    y = h @ Cm[:, 0, :, :, None].to(dtype)
    y = y.view(B, 1, H, P)
    return _skipped(y, x, D).to(x.dtype), h.view(B, H, P, N)


def ssd_loop(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor | None, starts: Tensor | None, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ssd_sequential` in fp32 (fp64), y in x's dtype."""
    dtype = _inner(x.dtype)
    h0, D = (None if t is None else t.to(dtype) for t in (h0, D))
    y, h = ssd_sequential(x.to(dtype), dt.to(dtype), A.to(dtype), Bm.to(dtype), Cm.to(dtype), h0, starts, D=D)
    return y.to(x.dtype), h


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor | None, starts: Tensor | None, chunk: int, D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same values: quadratic inside chunks, linear across them; no (T, T) matrix beyond a chunk."""
    dtype, (B, T, H, P), (G, N) = _inner(x.dtype), x.shape, Bm.shape[2:]
    Q = min(chunk, T, LONGEST)
    pad, C = -T % Q, -(-T // Q)
    x_, dt_, B_, C_ = (F.pad(t.to(dtype), (0, 0) * (t.ndim - 2) + (0, pad)).unflatten(1, (C, Q)) for t in (x, dt, Bm, Cm))
    # Nothing passes between steps of unequal counts of starts. Every sum of decays is taken over its own steps: of a difference of sums from the
    # chunk's start, and of its gradient, a large step leaves no digits to the small ones.
    documents = None if starts is None else F.pad(starts, (0, pad)).unflatten(1, (C, Q)).int().cumsum(2)
    decay_BCHQ = (dt_ * A.to(dtype)).transpose(2, 3)
    weighted = (x_ * dt_[..., None]).unflatten(3, (G, H // G))
    # Inside a chunk: y_i += sum_{j<=i} (C_i . B_j) exp(decay_{j+1} + .. + decay_i) dt_j x_j
    scores = torch.einsum("bcign,bcjgn->bcgij", C_, B_)
    allowed = torch.ones(Q, Q, dtype=torch.bool, device=x.device).tril()
    between = decay_BCHQ[..., None].expand(*decay_BCHQ.shape, Q).masked_fill(~allowed.tril(-1), 0.0).cumsum(3)
    if documents is not None:
        allowed = allowed & (documents[:, :, None, :, None] == documents[:, :, None, None, :])
    matrix = torch.exp(between.masked_fill(~allowed, float("-inf"))).unflatten(2, (G, H // G)) * scores[:, :, :, None]
    y = torch.einsum("bcghij,bcjghp->bcighp", matrix, weighted)
    # Across chunks: what each adds to the state at its end, and what is left of the state before it.
    to_end = F.pad(decay_BCHQ[..., 1:], (0, 1)).flip(3).cumsum(3).flip(3).transpose(2, 3)
    from_start, through = decay_BCHQ.cumsum(3).transpose(2, 3), decay_BCHQ.sum(3)
    if documents is not None:
        to_end = to_end.masked_fill((documents != documents[:, :, -1:])[..., None], float("-inf"))
        from_start = from_start.masked_fill((documents != 0)[..., None], float("-inf"))
        through = through.masked_fill((documents[:, :, -1] != 0)[..., None], float("-inf"))
    to_end, from_start, through = torch.exp(to_end), torch.exp(from_start), torch.exp(through)
    # Two factors at a time: a product of three would pass through a (B, T, H, P, N) intermediate.
    added = torch.einsum("bcjgn,bcjghp->bcghpn", B_, weighted * to_end.unflatten(3, (G, H // G))[..., None]).flatten(2, 3)
    h = x.new_zeros(B, H, P, N, dtype=dtype) if h0 is None else h0.to(dtype)
    before = []
    for c in range(C):
        before.append(h)
        h = through[:, c, :, None, None] * h + added[:, c]
    carried = torch.stack(before, 1).unflatten(2, (G, H // G))
    y = y + torch.einsum("bcign,bcghpn->bcighp", C_, carried) * from_start.unflatten(3, (G, H // G))[..., None]
    return _skipped(y.reshape(B, C * Q, H, P)[:, :T], x, D).to(x.dtype), h
