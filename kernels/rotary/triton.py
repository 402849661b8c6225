"""The Triton kernel of rotary positions, and its launch; imported when it is first wanted.

A program turns some heads of some rows, queries and keys alike, by angles that it finds once.

Legend: B batch, T time, N = B T rows, H query heads, G key heads, K head width.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

from kernels.rotary.reference import frequencies

HEADS, ELEMENTS, WARPS = 4, 1024, 4  # heads and pairs of a program


@triton.jit
def _turn(X, Y, x, y, half, inside, cos, sin):
    a = tl.load(X + x, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + x + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + y, (a * cos - b * sin).to(Y.dtype.element_ty), mask=inside)
    tl.store(Y + y + half, (b * cos + a * sin).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def turn(
    Q, KEYS, POSITIONS, FREQUENCIES, YQ, YK, N, T, half, K, FACTOR, sqb, sqh, sqt, skb, skh, skt, rq, rk,
    H: tl.constexpr, G: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)[None, :]
    inside = (row < N)[:, None] & (k < half)
    b, t, n = (row // T).to(tl.int64)[:, None], (row % T).to(tl.int64)[:, None], row.to(tl.int64)[:, None]
    position = tl.load(POSITIONS + row % T, mask=row < N, other=0).to(tl.float32)[:, None]
    angle = position * tl.load(FREQUENCIES + k, mask=k < half, other=0.0)
    cos, sin = tl.cos(angle) * FACTOR, tl.sin(angle) * FACTOR
    if BACK:
        sin = -sin
    for i in tl.static_range(HEADS):
        h = tl.program_id(1) * HEADS + i
        if h < H:
            _turn(Q, YQ, b * sqb + h * sqh + t * sqt + k, n * rq + h * K + k, half, inside, cos, sin)
        elif h < H + G:
            g = h - H
            _turn(KEYS, YK, b * skb + g * skh + t * skt + k, n * rk + g * K + k, half, inside, cos, sin)


_kept = {}  # frequencies by (K, theta, device)


def _frequencies(K, theta, device):
    """Kept from call to call, but for a tensor made while a graph is captured, which is that graph's."""
    found = _kept.get((K, theta, device))
    if found is None:
        found = frequencies(K, theta, device)
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _kept[K, theta, device] = found
    return found


def launch(q_BHTK, k_BGTK, positions_T, theta, back, frequencies_J=None, scale=1.0, joined=False):
    """Both turned, views (B, heads, T, K) of contiguous (B, T, heads, K); back: the other way, as gradients are. joined: of columns of one tensor, so
    that the products which made queries and keys take their gradients as one (kernels/linear)."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHTK, k_BGTK))
    (B, H, T, K), G = q.shape, k.shape[1]
    if joined:
        yq, yk = q.new_empty(B, T, H + G, K).split((H, G), 2)
    else:
        yq, yk = (x.new_empty(B, T, heads, K) for x, heads in ((q, H), (k, G)))
    turns = _frequencies(K, theta, q.device) if frequencies_J is None else frequencies_J.float().contiguous()
    half = turns.shape[0]
    if 2 * half < K:  # columns without a position
        for x, y in ((q, yq), (k, yk)):
            y[..., 2 * half :] = x[..., 2 * half :].transpose(1, 2)
    BK = triton.next_power_of_2(half)
    BR = 2 if q.device.type == "cpu" else min(max(1, ELEMENTS // BK), triton.next_power_of_2(B * T))
    turn[(triton.cdiv(B * T, BR), triton.cdiv(H + G, HEADS))](
        q, k, positions_T.contiguous(), turns, yq, yk, B * T, T, half, K, float(scale),
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), yq.stride(1), yk.stride(1),
        H=H, G=G, BACK=back, HEADS=HEADS, BR=BR, BK=BK, num_warps=WARPS,
    )  # fmt: skip
    return yq.transpose(1, 2), yk.transpose(1, 2)
