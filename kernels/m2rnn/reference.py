"""M2RNN (arXiv 2603.14360) in plain torch: the loop that says what is right, and one that keeps the states at borders only.

Legend: B batch, T time, H heads, G heads of queries and keys, K key width (rows of a state), V value width (its columns), n chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.parallel_rnn.reference import compute_dtype

EVERY = 64  # steps between the states that are kept


def grouped(x_BTGK: Tensor, heads: int) -> Tensor:
    """(B, T, H, K): what heads share, once for each of them."""
    return x_BTGK if x_BTGK.shape[2] == heads else x_BTGK.repeat_interleave(heads // x_BTGK.shape[2], 2)


def m2rnn_sequential(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, V), final state (B, H, K, V)) step by step, all in the dtype of the arithmetic; arguments as of `kernels.m2rnn.m2rnn`."""
    inner, heads = compute_dtype(v), v.shape[2]
    q, k = (grouped(x, heads).to(inner) for x in (q, k))
    v, g, w = (x.to(inner) for x in (v, g, w))
    (B, T, H, K), V = q.shape, v.shape[3]
    h, out = v.new_zeros(B, H, K, V) if h0 is None else h0.to(inner), []
    for t in range(T):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], 0.0, h)
        new = torch.tanh(h @ w + k[:, t, :, :, None] * v[:, t, :, None])
        gate = g[:, t, :, None, None]
        h = torch.exp(gate) * h - torch.expm1(gate) * new
        out.append((q[:, t, :, :, None] * h).sum(2))
    return (torch.stack(out, 1) if out else v[:, :0]), h


def m2rnn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop as the public function: o in v's dtype, whatever autocast says."""
    with torch.autocast(v.device.type, enabled=False):
        o, final = m2rnn_sequential(q, k, v, g, w, h0, starts)
    return o.to(v.dtype), final


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final, the states (B, H, n, K, V) before each chunk)."""
    (B, T, H, V), K, inner, chunk = v.shape, q.shape[3], compute_dtype(v), EVERY
    h = torch.zeros(B, H, K, V, dtype=inner, device=v.device) if h0 is None else h0.to(inner)
    out, borders = [], []
    for first in range(0, T, chunk):
        borders.append(h)
        part = [x[:, first : first + chunk] for x in (q, k, v, g)]
        o, h = m2rnn_sequential(*(*part, w, h, None if starts is None else starts[:, first : first + chunk]))
        out.append(o)
    return torch.cat(out, 1), h, torch.stack(borders, 2)


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, starts: Tensor | None, borders: Tensor, do: Tensor, d_final: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, w and h0: each chunk is walked again from its border, and back with its states at hand."""
    inner, chunk, (T, heads), G = compute_dtype(v), EVERY, v.shape[1:3], q.shape[2]
    shared = heads // G
    q, k = (grouped(x, heads).to(inner) for x in (q, k))
    v, g, w, do, a = (x.to(inner) for x in (v, g, w, do, d_final))
    keep, write = torch.exp(g), -torch.expm1(g)
    dq, dk, dv, dg, dw = (torch.zeros_like(x) for x in (q, k, v, g, w))
    for first in reversed(range(0, T, chunk)):
        h, known = borders[:, :, first // chunk].to(inner), []
        for t in range(first, min(T, first + chunk)):
            if starts is not None:
                h = torch.where(starts[:, t, None, None, None], 0.0, h)
            new = torch.tanh(h @ w + k[:, t, :, :, None] * v[:, t, :, None])
            known.append((h, new))
            h = keep[:, t, :, None, None] * h + write[:, t, :, None, None] * new
        for t in reversed(range(first, min(T, first + chunk))):
            before, new = known.pop()
            f, i = keep[:, t, :, None, None], write[:, t, :, None, None]
            a = a + q[:, t, :, :, None] * do[:, t, :, None]
            dq[:, t] = ((f * before + i * new) * do[:, t, :, None]).sum(3)
            dg[:, t] = keep[:, t] * (a * (before - new)).sum((2, 3))
            dp = i * (1 - new * new) * a
            dk[:, t] = (dp * v[:, t, :, None]).sum(3)
            dv[:, t] = (dp * k[:, t, :, :, None]).sum(2)
            dw += (before.mT @ dp).sum(0)
            a = f * a + dp @ w.mT
            if starts is not None:
                a = torch.where(starts[:, t, None, None, None], 0.0, a)
    if shared > 1:
        dq, dk = (x.unflatten(2, (G, shared)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dg, dw, a
