"""Runs the Triton kernels of M2RNN; imports Triton only when a kernel is first wanted.

Saved for the backward pass are the inputs and the states at the borders of chunks of 64 steps, in fp32 (B H K V numbers a chunk). Going back, some
chunks at a time are walked again, side by side, for the slopes of their tanh; the adjoint is walked over them, one product a step; and they are
walked a third time, side by side, with the adjoints at hand, for everything that sums over steps do not wait for. No sum is made by atomic additions,
so results repeat bit for bit. Products take bf16 operands where v is bf16; fp16 is lifted to fp32, whose range the adjoint needs, and like fp32 multiplied
in three tf32 products. The carried state, its adjoint and the sum of the weight's gradient are fp32.

Legend: as in triton.py; n chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted, no_triton
from kernels.m2rnn.reference import EVERY
from kernels.parallel_rnn.launch import multiprocessors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST, WIDEST_OF_FOUR_BYTES = 128, 64  # columns of a state that are walked in registers, by the width of operands
# Rows of a state that are a program's, and its warps, by kernel and columns of bf16 operands. Where rows are fewer than 64 products are mma.sync's:
# ptxas 12.8, which Triton 3.6 brings, assembles some of wgmma with blocks of 16 or 32 columns wrongly for an H100.
Tiles = dict[str, tuple[int, int]]
TILES: dict[int, Tiles] = {
    16: {"walk": (16, 1), "slopes": (64, 2), "adjoint": (16, 1), "gradients": (32, 1)},
    32: {"walk": (16, 2), "slopes": (16, 1), "adjoint": (16, 2), "gradients": (16, 2)},
    64: {"walk": (16, 4), "slopes": (64, 4), "adjoint": (16, 4), "gradients": (64, 4)},
    128: {"walk": (16, 8), "slopes": (64, 8), "adjoint": (16, 8), "gradients": (32, 8)},
}
TILES_WIDE: Tiles = {"walk": (16, 4), "slopes": (16, 4), "adjoint": (16, 8), "gradients": (16, 4)}  # of operands of four bytes
# Tiles of the walks in order, for those of TILES: how many programs a multiprocessor holds at a time, and microseconds of a step (H200, 256 programs or
# fewer). Those beyond what the GPU holds begin when others have walked all steps, so that fewer programs of more rows may be done sooner.
WALKS: dict[int, dict[str, dict[tuple[int, int], tuple[int, float]]]] = {
    64: {
        "walk": {(16, 4): (3, 0.65), (32, 4): (2, 0.68), (64, 4): (2, 1.12)},
        "adjoint": {(16, 4): (3, 0.59), (32, 4): (2, 0.68), (64, 4): (2, 0.87)},
    }
}
NARROWEST = 16  # columns and rows are filled up to so many
SCRATCH = 1 << 30  # bytes, of slopes and adjoints of the chunks that are gone back over at a time


def why_not(v: Tensor) -> str:
    """Empty if the kernels can run on these values, else one sentence."""
    reason = no_triton(v.device) or ("" if v.dtype in DTYPES else f"The kernels of M2RNN have no {v.dtype}.")
    widest = WIDEST if v.dtype == torch.bfloat16 else WIDEST_OF_FOUR_BYTES
    if not reason and v.shape[-1] > widest:
        reason = f"The kernels of M2RNN hold states of {widest} columns in {v.dtype}, not of {v.shape[-1]}."
    return reason


def pad(width: int, least: int) -> int:
    """The power of two that holds width."""
    return max(least, 1 << (width - 1).bit_length())


def neighbours(x: Tensor) -> Tensor:
    """(B, T, heads, width), neighbours along the last dimension. Other strides are free, but that kernels count the heads of a step in 32 bits."""
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.shape[2] * x.stride(2) < 1 << 31 else x.contiguous()


def kernels() -> Any:
    from kernels.m2rnn import triton

    return triton


class Problem:
    """The arguments of one call in the form the kernels take, and what all kernels of a pass share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, starts: Tensor | None) -> None:
        self.kernels = kernels()
        tl, kind = self.kernels.tl, v.dtype
        self.q, self.k, self.v = (neighbours(x.to(kind)) for x in (q, k, v))
        (self.B, self.T, self.G, self.K), (self.H, self.V) = q.shape, v.shape[2:]
        self.columns, self.chunks, self.shared = pad(self.V, NARROWEST), -(-self.T // EVERY), self.H // self.G
        gate = g.float()
        self.keep, self.write = torch.exp(gate).contiguous(), (-torch.expm1(gate)).contiguous()
        self.starts = self.keep if starts is None else starts.contiguous().view(torch.uint8)
        narrow = kind == torch.bfloat16 and not interpreted()  # the interpreter has no bf16 products
        self.operand = torch.bfloat16 if narrow else torch.float32
        self.w = w.new_zeros(self.H, self.columns, self.columns, dtype=self.operand)
        self.w[:, : self.V, : self.V] = w
        self.numbers: dict[str, Any] = {
            "HAS_STARTS": starts is not None, "DOT": tl.bfloat16 if narrow else tl.float32, "PRECISION": "ieee" if narrow else "tf32x3",
            "BV": self.columns, "num_stages": 1,
        }  # fmt: skip
        self.tiles = TILES[self.columns] if narrow else TILES_WIDE
        if narrow:
            self.tiles = {**self.tiles, **{kernel: self.soonest(tiles) for kernel, tiles in WALKS.get(self.columns, {}).items()}}
        self.fast = narrow and torch.version.hip is None
        self.at = {name: x.stride()[:3] for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}

    def soonest(self, tiles: dict[tuple[int, int], tuple[int, float]]) -> tuple[int, int]:
        """The tile with which all programs are done first."""
        multi, heads = multiprocessors(self.v.device), self.B * self.H

        def time(tile: tuple[int, int]) -> float:
            resident, step = tiles[tile]
            return -(-heads * -(-self.K // tile[0]) // (resident * multi)) * step

        return min(tiles, key=time)

    def rows(self, kernel: str) -> int:
        """Rows of a state that are a program's."""
        return min(self.tiles[kernel][0], pad(self.K, NARROWEST))

    def blocks(self, kernel: str) -> int:
        return -(-self.K // self.rows(kernel))

    def run(self, kernel: str, *arguments: Any, side_by_side: int = 1, **constants: Any) -> None:
        grid = (self.B * self.H * self.blocks(kernel), side_by_side)
        constants |= {"BK": self.rows(kernel), "num_warps": self.tiles[kernel][1], **self.numbers}
        getattr(self.kernels, kernel)[grid](*arguments, **constants)

    def sizes(self, kernel: str) -> tuple[int, ...]:
        return self.T, self.H, self.K, self.V, self.shared, self.blocks(kernel)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.v.device)

    def parts(self, blocks: int, *shape: int) -> Tensor:
        """A result that blocks of rows add up to: one for each of them, in fp32 if there are several."""
        return self.scratch(blocks, *shape, dtype=self.v.dtype if blocks == 1 else torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(o (B, T, H, V) in v's dtype, final state (B, H, K, V) fp32, states before chunks (B, H, n, K, V) fp32, none without `keep`)."""
    p = Problem(q, k, v, g, w, starts)
    o, final = p.parts(p.blocks("walk"), p.B, p.T, p.H, p.V), p.scratch(p.B, p.H, p.K, p.V)
    borders = p.scratch(p.B, p.H, p.chunks if keep else 0, p.K, p.V)
    begin = final if h0 is None else h0.float().contiguous()
    p.run(
        "walk", p.q, p.k, p.v, p.keep, p.write, p.starts, p.w, begin, o, final, borders, p.B, *p.sizes("walk"), p.chunks,
        *p.at["q"], *p.at["k"], *p.at["v"], HAS_H0=h0 is not None, HAS_BORDERS=keep, CHUNK=EVERY, FAST=p.fast,
    )  # fmt: skip
    return total(o, v.dtype), final, borders


def total(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return (parts[0] if parts.shape[0] == 1 else parts.sum(0)).to(dtype)


def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, starts: Tensor | None, borders: Tensor, do: Tensor, d_final: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, w and h0: those of q, k and v in the dtype of v, the others in fp32."""
    p = Problem(q, k, v, g, w, starts)
    (B, T, H, K, V), do = (p.B, p.T, p.H, p.K, p.V), do.to(v.dtype).contiguous()
    dq, dk = (p.scratch(B, T, H, K, dtype=v.dtype if p.shared == 1 else torch.float32) for _ in range(2))
    blocks = p.blocks("gradients")
    dv, dg = p.parts(blocks, B, T, H, V), p.scratch(B, T, H, K)
    adjoint = d_final.float().clone(memory_format=torch.contiguous_format)
    rows = max(p.rows(kernel) * p.blocks(kernel) for kernel in p.tiles)
    size, numbers = p.operand.itemsize, B * H * EVERY * rows * p.columns  # of slopes and of adjoints of a chunk
    at_once = max(1, min(p.chunks, SCRATCH // (2 * size * numbers), 65535))
    slopes = p.scratch(at_once * numbers, dtype=torch.float16 if size == 2 else torch.float32)
    adjoints, dw = p.scratch(at_once * numbers, dtype=p.operand), torch.zeros(at_once, B, H, blocks, p.columns, p.columns, device=v.device)
    if p.rows("adjoint") * p.blocks("adjoint") < p.rows("gradients") * blocks:
        adjoints.zero_()  # rows that `gradients` reads and nobody writes: of no state, but nothing times what lies there may be NaN
    for first in reversed(range(0, p.chunks, at_once)):
        many = min(at_once, p.chunks - first)
        walked = {"side_by_side": many, "CHUNK": EVERY, "FAST": p.fast, "ROWS": rows}
        p.run(
            "slopes",
            p.k,
            p.v,
            p.keep,
            p.write,
            p.starts,
            p.w,
            borders,
            slopes,
            first,
            *p.sizes("slopes"),
            p.chunks,
            *p.at["k"],
            *p.at["v"],
            **walked,
        )
        p.run(
            "adjoint", p.q, p.keep, p.write, p.starts, p.w, slopes, do, adjoints, adjoint, first * EVERY, min(T, (first + many) * EVERY), many * EVERY, B,
            *p.sizes("adjoint"), *p.at["q"], ROWS=rows,
        )  # fmt: skip
        p.run(
            "gradients", p.k, p.v, p.keep, p.write, p.starts, p.w, borders, adjoints, do, dq, dk, dv, dg, dw, first, B, *p.sizes("gradients"), p.chunks,
            *p.at["k"], *p.at["v"], **walked,
        )  # fmt: skip
    if p.shared > 1:
        dq, dk = (x.unflatten(2, (p.G, p.shared)).sum(3).to(v.dtype) for x in (dq, dk))
    return dq, dk, total(dv, v.dtype), dg.sum(3), dw.sum((0, 1, 3))[:, :V, :V], adjoint
