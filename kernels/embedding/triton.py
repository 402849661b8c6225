"""Triton kernels of a table's gradient, and their launches; imported when one is first wanted.

Tokens are sorted by their ids, so that those of an id are a run of places. A program sums the run of one id; of a long one it takes the sums of its
whole pieces, which programs of their own have made.

Legend: N tokens, V rows of the table, D width.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import torch
import triton
import triton.language as tl

PIECE, AT_ONCE = 64, 4  # places of a piece, rows that a program reads at once
COLUMNS, WARPS = 1024, 4  # at most, of a program


@triton.jit
def _added(total, GIVEN, ORDER, first, last, D, c, inside, AT_ONCE: tl.constexpr):
    """total (AT_ONCE, columns), with the gradients of the tokens at places first .. last - 1."""
    for start in range(first, last, AT_ONCE):
        place = start + tl.arange(0, AT_ONCE)
        token = tl.load(ORDER + place, mask=place < last, other=0).to(tl.int64)
        total += tl.load(GIVEN + token[:, None] * D + c[None, :], mask=(place < last)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return total


@triton.jit
def embedding_pieces(GIVEN, IDS, ORDER, PARTIAL, N, D, PIECE: tl.constexpr, AT_ONCE: tl.constexpr, BD: tl.constexpr):
    """The sums of whole pieces whose places are all of one id; of others nothing is written."""
    p = tl.program_id(0)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    first = p * PIECE
    if tl.load(IDS + first) == tl.load(IDS + first + PIECE - 1):
        total = _added(tl.zeros((AT_ONCE, BD), tl.float32), GIVEN, ORDER, first, first + PIECE, D, c, c < D, AT_ONCE)
        tl.store(PARTIAL + p.to(tl.int64) * D + c, tl.sum(total, 0), mask=c < D)


@triton.jit
def embedding_rows(GIVEN, BEGINS, ORDER, PARTIAL, TABLE, D, PIECE: tl.constexpr, AT_ONCE: tl.constexpr, BD: tl.constexpr):
    """Row v of the table: the places from BEGINS[v] to BEGINS[v + 1]."""
    v = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = c < D
    first, last = tl.load(BEGINS + v), tl.load(BEGINS + v + 1)
    total = tl.zeros((AT_ONCE, BD), tl.float32)
    whole, end = tl.cdiv(first, PIECE), last // PIECE  # pieces that lie in the run
    if whole < end:
        total = _added(total, GIVEN, ORDER, first, whole * PIECE, D, c, inside, AT_ONCE)
        for start in range(whole, end, AT_ONCE):
            piece = (start + tl.arange(0, AT_ONCE))[:, None]
            total += tl.load(PARTIAL + piece.to(tl.int64) * D + c[None, :], mask=(piece < end) & inside[None, :], other=0.0)
        first = end * PIECE
    total = _added(total, GIVEN, ORDER, first, last, D, c, inside, AT_ONCE)
    tl.store(TABLE + v * D + c, tl.sum(total, 0), mask=inside)


def table_gradient(d, ids, rows):
    d, (N, D) = d.contiguous(), d.shape
    ids, order = torch.sort(ids.int(), stable=True)  # half the passes of 64 bits
    starts = torch.searchsorted(ids, torch.arange(rows + 1, dtype=torch.int32, device=d.device), out_int32=True)
    out, pieces = torch.empty(rows, D, device=d.device), N // PIECE
    partial = torch.empty(pieces, D, device=d.device)
    BD = min(COLUMNS, triton.next_power_of_2(D))
    across = triton.cdiv(D, BD)
    if pieces:
        embedding_pieces[(pieces, across)](d, ids, order, partial, N, D, PIECE=PIECE, AT_ONCE=AT_ONCE, BD=BD, num_warps=WARPS)
    embedding_rows[(rows, across)](d, starts, order, partial, out, D, PIECE=PIECE, AT_ONCE=AT_ONCE, BD=BD, num_warps=WARPS)
    return out
