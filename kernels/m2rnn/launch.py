"""Runs the Triton kernels of M2RNN; imports Triton only when a kernel is first wanted.

Saved for the backward pass are the inputs and the states at the borders of chunks of 64 steps, in fp32 (B H K V numbers a chunk). Going back, the
states of some chunks at a time are made again, all of these chunks side by side, and walked over. No sum is made by atomic additions, so results
repeat bit for bit. Products take bf16 operands where v is bf16; fp16 is lifted to fp32, whose range the adjoint needs, and like fp32 multiplied
in three tf32 products. The carried state, its adjoint and the sum of the weight's gradient are fp32.

Legend: as in triton.py; n chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import interpreted, no_triton
from kernels.m2rnn.reference import CHUNK

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = 64  # of a state, those of a program
WIDEST, WIDEST_OF_FOUR_BYTES = 128, 64  # columns of a state that are walked in registers, by the width of operands
# Warps of a program by the columns of bf16 operands, and of others.
WARPS = {64: {"walk": 4, "states": 4, "back": 8}, 128: {"walk": 8, "states": 8, "back": 8}}
WARPS_WIDE = {"walk": 8, "states": 8, "back": 8}
# Columns are filled up to so many: ptxas 12.8, which Triton 3.6 brings, assembles some products with blocks of 16 or 32 wrongly for an H100.
NARROWEST = 64
TANHS = False  # keep also what the tanh of each step gives, in fp16 where operands are bf16, instead of making it again
PROGRAMS = 264  # wanted while states are made again


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
    """Neighbours along the last dimension; other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Problem:
    """The arguments of one call in the form the kernels take, and what all kernels of a pass share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, starts: Tensor | None) -> None:
        from kernels.m2rnn import triton

        self.module, tl, kind = triton, triton.tl, v.dtype
        least, rows = (16, 64) if interpreted() else (NARROWEST, ROWS)
        self.q, self.k, self.v = (neighbours(x.to(kind)) for x in (q, k, v))
        (self.B, self.T, self.G, self.K), (self.H, self.V) = q.shape, v.shape[2:]
        self.rows, self.columns = min(rows, pad(self.K, min(rows, least))), pad(self.V, least)
        self.blocks, self.chunks, self.shared = -(-self.K // self.rows), -(-self.T // CHUNK), self.H // self.G
        gate = g.float()
        self.keep, self.write = torch.exp(gate).contiguous(), (-torch.expm1(gate)).contiguous()
        self.starts = self.keep if starts is None else starts.contiguous().view(torch.uint8)
        narrow = kind == torch.bfloat16 and not interpreted()  # the interpreter has no bf16 products
        self.operand = torch.bfloat16 if narrow else torch.float32
        self.w = w.new_zeros(self.H, self.columns, self.columns, dtype=self.operand)
        self.w[:, : self.V, : self.V] = w
        self.common: dict[str, Any] = {
            "HAS_STARTS": starts is not None, "DOT": tl.bfloat16 if narrow else tl.float32, "PRECISION": "ieee" if narrow else "tf32x3",
            "FAST": narrow and torch.version.hip is None, "BK": self.rows, "BV": self.columns, "num_stages": 1,
        }  # fmt: skip
        self.warps = WARPS[max(64, self.columns)] if narrow else WARPS_WIDE
        self.programs = self.B * self.H * self.blocks
        self.sizes = (self.T, self.H, self.K, self.V, self.shared, self.blocks)
        self.at = {name: x.stride()[:3] for name, x in (("q", self.q), ("k", self.k), ("v", self.v))}

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.v.device)

    def parts(self, *shape: int) -> Tensor:
        """A result that blocks of rows add up to: one for each of them, in fp32 if there are several."""
        return self.scratch(self.blocks, *shape, dtype=self.v.dtype if self.blocks == 1 else torch.float32)


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(o (B, T, H, V) in v's dtype, final state (B, H, K, V) fp32, states before chunks (B, H, n, K, V) fp32, none without `keep`)."""
    p = Problem(q, k, v, g, w, starts)
    o, final = p.parts(p.B, p.T, p.H, p.V), p.scratch(p.B, p.H, p.K, p.V)
    borders = p.scratch(p.B, p.H, p.chunks if keep else 0, p.K, p.V)
    begin = final if h0 is None else h0.float().contiguous()
    p.module.walk[(p.programs,)](
        p.q, p.k, p.v, p.keep, p.write, p.starts, p.w, begin, o, final, borders, p.B, *p.sizes, p.chunks, *p.at["q"], *p.at["k"], *p.at["v"],
        HAS_H0=h0 is not None, HAS_BORDERS=keep, CHUNK=CHUNK, num_warps=p.warps["walk"], **p.common,
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
    dv, dg = p.parts(B, T, H, V), p.scratch(p.blocks, B, T, H)
    adjoint = d_final.float().clone(memory_format=torch.contiguous_format)
    dw = torch.zeros(p.programs, p.columns, p.columns, device=v.device)
    at_once = min(p.chunks, max(1, -(-PROGRAMS // p.programs)))
    states = p.scratch(p.programs, at_once * CHUNK, p.rows, p.columns, dtype=p.operand)
    tanhs = torch.empty_like(states, dtype=torch.float16 if p.operand == torch.bfloat16 else None) if TANHS else states
    for first in reversed(range(0, p.chunks, at_once)):
        many = min(at_once, p.chunks - first)
        p.module.states[(p.programs, many)](
            p.k, p.v, p.keep, p.write, p.starts, p.w, borders, states, tanhs, first, *p.sizes, p.chunks, *p.at["k"], *p.at["v"], CHUNK=CHUNK,
            HAS_TANHS=TANHS, num_warps=p.warps["states"], **p.common,
        )  # fmt: skip
        p.module.back[(p.programs,)](
            p.q, p.k, p.v, p.keep, p.write, p.starts, p.w, states, tanhs, do, dq, dk, dv, dg, dw, adjoint, first * CHUNK, min(T, (first + many) * CHUNK),
            many * CHUNK, B, *p.sizes, *p.at["q"], *p.at["k"], *p.at["v"], HAS_TANHS=TANHS, num_warps=p.warps["back"], **p.common,
        )  # fmt: skip
    if p.shared > 1:
        dq, dk = (x.unflatten(2, (p.G, p.shared)).sum(3).to(v.dtype) for x in (dq, dk))
    dw = dw.view(B, H, p.blocks, p.columns, p.columns).sum((0, 2))[:, :V, :V]
    return dq, dk, total(dv, v.dtype), dg.sum(0), dw, adjoint
