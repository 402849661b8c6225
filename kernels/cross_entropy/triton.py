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
def _by_eight(BV: tl.constexpr):
    """(BV / 8, 8): those of a row are one thread's, which adds up their exponentials relative to one largest logit."""
    return tl.arange(0, BV // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _with_more(x, most, total):
    """Sums of exponentials relative to the largest logit so far (BV / 8 of each), with more logits in them. What is no number stays in the sum."""
    above = tl.maximum(most, tl.max(x, 1))
    kept = tl.where(above == float("-inf"), 0.0, above)  # nothing but -inf so far: no difference of infinities
    return above, total * tl.exp2((most - kept) * LOG2E) + tl.sum(tl.exp2((x - kept[:, None]) * LOG2E), 1)


@triton.jit
def log_partition(ROW, V, BV: tl.constexpr):
    """Of the logits at ROW: one exponential a logit, and one of eight for what the largest one moves."""
    column = _by_eight(BV)
    most = tl.full((BV // 8,), float("-inf"), tl.float32)
    total = tl.zeros((BV // 8,), tl.float32)
    whole = V // BV * BV
    for start in range(0, whole, BV):
        most, total = _with_more(tl.load(ROW + start + column).to(tl.float32), most, total)
    if whole < V:
        x = tl.load(ROW + whole + column, mask=whole + column < V, other=float("-inf")).to(tl.float32)
        most, total = _with_more(x, most, total)
    largest = tl.max(most, 0)
    kept = tl.where(largest == float("-inf"), 0.0, largest)
    return kept + tl.log2(tl.sum(total * tl.exp2((most - kept) * LOG2E), 0)) * LN2  # the largest logit as it is, not scaled to and fro


@triton.jit
def losses(LOGITS, LABELS, NLL, LOG_Z, V, BV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    log_z = log_partition(LOGITS + row * V, V, BV)
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
    at, column = LOGITS + row * V, _by_eight(BV)
    label = tl.load(LABELS + row)
    counted, known = label != -100, (label >= 0) & (label < V)
    picked = tl.load(at + label, mask=known, other=float("nan")).to(tl.float32)  # before anything is written over
    log_z = log_partition(at, V, BV)
    tl.store(LOG_Z + row, tl.where(counted, log_z, 0.0))
    tl.store(NLL + row, tl.where(counted, log_z - picked, 0.0))
    log_z = tl.where(known, log_z, float("nan"))
    whole = V // BV * BV
    if whole < V:
        inside = whole + column < V
        d = tl.exp2((tl.load(at + whole + column, mask=inside, other=0.0).to(tl.float32) - log_z) * LOG2E)
        tl.store(at + whole + column, tl.where(counted, d, 0.0).to(LOGITS.dtype.element_ty), mask=inside)
    for i in range(0, whole, BV):
        turn = at + (whole - BV - i) + column
        d = tl.exp2((tl.load(turn).to(tl.float32) - log_z) * LOG2E)
        tl.store(turn, tl.where(counted, d, 0.0).to(LOGITS.dtype.element_ty))
    tl.debug_barrier()  # the label's place is written twice
    tl.store(at + label, (tl.exp2((picked - log_z) * LOG2E) - 1.0).to(LOGITS.dtype.element_ty), mask=known)
