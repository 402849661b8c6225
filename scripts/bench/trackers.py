"""Exact trackers of finite groups, made by hand: weights of a dense cell whose heads follow the product of all elements read so far.

A channel (x, g) of a head is 1 after the element x was read last and the product is g, else -1; so a group of n elements with X of them to read
takes X n channels, and there are as many states. All is saturated: the states are exact in any dtype. Parity, sums modulo 5, and S3, S4 and A5
with two elements that make the group.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn.cell import Cell

GAIN = 32.0  # of a hyperbolic tangent: 1 in every dtype
TRACKERS = ("parity", "mod-5", "S3", "S4", "A5")


def products(name: str) -> tuple[Tensor, int]:
    """(X, n): where reading element x takes the product g; the place of the neutral element."""
    if name in ("parity", "mod-5"):
        n = 2 if name == "parity" else 5
        return (torch.arange(n)[:, None] + torch.arange(n)) % n, 0
    things, even = int(name[1]), name[0] == "A"
    elements = list(itertools.permutations(range(things)))
    elements = [p for p in elements if not even or sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0]
    place = {p: i for i, p in enumerate(elements)}
    cycle = (*range(1, things), 0)
    other = (1, 2, 0, *range(3, things)) if even else (1, 0, *range(2, things))
    return torch.tensor([[place[tuple(g[i] for i in x)] for g in elements] for x in (cycle, other)]), place[tuple(range(things))]


def size(name: str) -> tuple[int, int]:
    """(channels of a head, elements of the group)."""
    return products(name)[0].numel(), products(name)[0].shape[1]


def tracker(
    name: str, cell: Cell, batch: int, length: int, heads: int, dtype: torch.dtype, device: Any = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pre (B, T, P, D), rec (R, D), mat (E, K, G, K), h0 (B, 1, D)) of a dense Elman network or GRU: each head reads words of its own."""
    moves, neutral = products(name)
    (X, n), E = moves.shape, heads
    K, P = X * n, len(cell.pre)
    R = torch.zeros(X, n, X, n)  # from (last element, product) to them
    for x in range(X):
        R[:, torch.arange(n), x, moves[x]] = GAIN
    read = torch.randint(X, (batch, length, E), generator=torch.Generator().manual_seed(seed))
    bias = torch.full((X, X), -3 * GAIN).fill_diagonal_(GAIN * (X - 1))
    value = bias[read][..., None].expand(-1, -1, -1, -1, n).flatten(2)
    pre, mat = torch.zeros(batch, length, P, E * K), torch.zeros(E, K, len(cell.mat), K)
    if P > 1:  # a GRU that keeps nothing and resets nothing
        pre[:, :, cell.pre.index("r")], pre[:, :, cell.pre.index("z")] = 200.0, -200.0
    pre[:, :, cell.pre.index("n" if P > 1 else "x")] = value
    mat[:, :, -1] = R.view(K, K)
    h0 = torch.full((batch, 1, E, X, n), -1.0)
    h0[:, :, :, 0, neutral] = 1
    rec = torch.zeros(len(cell.rec), E * K)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return pre.to(device, dtype), rec.to(device, wide), mat.to(device, wide), h0.flatten(2).to(device, wide)
