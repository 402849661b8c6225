"""Triton kernels of the cross entropy; the package's functions run them. A row a program, in pieces of BV columns.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

# mypy: ignore-errors
# (arguments of kernels are pointers and numbers of Triton's own kinds)
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log_partition(LOGITS, row, V, BV: tl.constexpr):
    """The sum of exponentials is kept relative to the largest logit so far, per column of the block, and added up at the end."""
    column = tl.arange(0, BV)
    most = tl.full((BV,), float("-inf"), tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        x = tl.load(LOGITS + row * V + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        above = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
        kept = tl.where(above == float("-inf"), 0.0, above)  # nothing but -inf so far: no difference of infinities
        total = total * tl.exp2((most - kept) * LOG2E) + tl.exp2((x - kept) * LOG2E)
        most = above
    largest = tl.max(most, 0)
    kept = tl.where(largest == float("-inf"), 0.0, largest)
    return kept + tl.log2(tl.sum(total * tl.exp2((most - kept) * LOG2E), 0)) * LN2  # the largest logit as it is, not scaled to and fro


@triton.jit
def losses(LOGITS, LABELS, NLL, LOG_Z, V, BV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    log_z = log_partition(LOGITS, row, V, BV)
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < V)
    picked = tl.load(LOGITS + row * V + label, mask=known, other=float("nan")).to(tl.float32)
    tl.store(LOG_Z + row, tl.where(label == -100, 0.0, log_z))
    tl.store(NLL + row, tl.where(label == -100, 0.0, log_z - picked))


@triton.jit
def logits_gradient(LOGITS, LABELS, LOG_Z, G_NLL, G_LOG_Z, V, BV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    at = LOGITS + row * V + column
    label = tl.load(LABELS + row)
    g_nll = tl.where((label >= 0) & (label < V), tl.load(G_NLL + row), float("nan"))
    x = tl.load(at, mask=column < V, other=float("-inf")).to(tl.float32)
    d = tl.exp2((x - tl.load(LOG_Z + row)) * LOG2E) * (g_nll + tl.load(G_LOG_Z + row))
    d = tl.where(label == -100, 0.0, d - tl.where(column == label, g_nll, 0.0))
    tl.store(at, d.to(LOGITS.dtype.element_ty), mask=column < V)


@triton.jit
def losses_and_gradient(LOGITS, LABELS, NLL, LOG_Z, V, BV: tl.constexpr):
    """Both at once: what a row's first pass has read the second finds in the cache, from its end on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BV)
    label = tl.load(LABELS + row)
    known = (label >= 0) & (label < V)
    picked = tl.load(LOGITS + row * V + label, mask=known, other=float("nan")).to(tl.float32)  # before anything is written over
    log_z = log_partition(LOGITS, row, V, BV)
    tl.store(LOG_Z + row, tl.where(label == -100, 0.0, log_z))
    tl.store(NLL + row, tl.where(label == -100, 0.0, log_z - picked))
    one = tl.where(known, 1.0, float("nan"))
    pieces = tl.cdiv(V, BV)
    for i in range(0, pieces):
        at = (pieces - 1 - i) * BV + column
        x = tl.load(LOGITS + row * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        d = tl.exp2((x - log_z) * LOG2E) * one
        d = tl.where(label == -100, 0.0, d - tl.where(at == label, one, 0.0))
        tl.store(LOGITS + row * V + at, d.to(LOGITS.dtype.element_ty), mask=at < V)
