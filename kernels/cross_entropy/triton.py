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


@triton.jit
def _halves(x):
    """Two bf16 of each word in fp32, that in its low half first."""
    return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _most(x):
    low, high = _halves(x)
    return tl.maximum(low, high)


@triton.jit
def _exponentials(x, base):
    low, high = _halves(x)
    return tl.exp2((low - base) * LOG2E) + tl.exp2((high - base) * LOG2E)


@triton.jit
def _words(low, high):
    low, high = low.to(tl.bfloat16).to(tl.uint16, bitcast=True), high.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    return low.to(tl.int32) | (high.to(tl.int32) << 16)


@triton.jit
def _gradient(x, log_z, counted, place, label, of_label):
    """Words of the gradient: shares of the logits x, at `place`, and in the word of the label that is of_label."""
    low, high = _halves(x)
    d = _words(tl.exp2((low - log_z) * LOG2E), tl.exp2((high - log_z) * LOG2E))
    return tl.where(counted, tl.where(place == label, of_label, d), 0)


@triton.jit
def losses_and_gradient_by_rows(WORDS, LABELS, NLL, LOG_Z, N, V, W, A: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr):
    """Both at once of bf16, W = V / 2 words a row: six pieces of A and a last one, all in registers while the next row is on its way. So a row is read
    once, where reading it again from the cache takes as long as a quarter of both."""
    a, rest = tl.arange(0, A), 6 * A + tl.arange(0, REST)
    inside = rest < W
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        at = WORDS + row * W.to(tl.int64)
        label = tl.load(LABELS + row)
        counted, known = label != -100, (label >= 0) & (label < V)
        label = tl.where(known, label, 0).to(tl.int32)
        word = tl.load(at + label // 2)
        x0, x1, x2 = tl.load(at + a), tl.load(at + A + a), tl.load(at + 2 * A + a)
        x3, x4, x5 = tl.load(at + 3 * A + a), tl.load(at + 4 * A + a), tl.load(at + 5 * A + a)
        x6 = tl.load(at + rest, mask=inside, other=-8323200)  # -inf twice
        most = tl.maximum(tl.maximum(_most(x0), _most(x1)), tl.maximum(_most(x2), _most(x3)))
        most = tl.maximum(most, tl.maximum(_most(x4), _most(x5)))
        largest = tl.maximum(tl.max(most, 0), tl.max(_most(x6), 0))
        kept = tl.where(largest == float("-inf"), 0.0, largest)
        total = _exponentials(x0, kept) + _exponentials(x1, kept)
        total += _exponentials(x2, kept)
        total += _exponentials(x3, kept)
        total += _exponentials(x4, kept)
        total += _exponentials(x5, kept)
        log_z = kept + tl.log2(tl.sum(total, 0) + tl.sum(_exponentials(x6, kept), 0)) * LN2
        low, high = _halves(word)
        first = label % 2 == 0
        picked = tl.where(known, tl.where(first, low, high), float("nan"))
        tl.store(LOG_Z + row, tl.where(counted, log_z, 0.0))
        tl.store(NLL + row, tl.where(counted, log_z - picked, 0.0))
        log_z = tl.where(known, log_z, float("nan"))
        low, high = tl.exp2((low - log_z) * LOG2E), tl.exp2((high - log_z) * LOG2E)
        of_label = _words(tl.where(first, low - 1.0, low), tl.where(first, high, high - 1.0))
        out = (WORDS.to(tl.pointer_type(tl.bfloat16)) + row * V.to(tl.int64)).to(tl.pointer_type(tl.int32))  # not kept through the stages
        label = tl.where(known, label // 2, -1)
        tl.store(out + a, _gradient(x0, log_z, counted, a, label, of_label))
        tl.store(out + A + a, _gradient(x1, log_z, counted, A + a, label, of_label))
        tl.store(out + 2 * A + a, _gradient(x2, log_z, counted, 2 * A + a, label, of_label))
        tl.store(out + 3 * A + a, _gradient(x3, log_z, counted, 3 * A + a, label, of_label))
        tl.store(out + 4 * A + a, _gradient(x4, log_z, counted, 4 * A + a, label, of_label))
        tl.store(out + 5 * A + a, _gradient(x5, log_z, counted, 5 * A + a, label, of_label))
        tl.store(out + rest, _gradient(x6, log_z, counted, rest, label, of_label), mask=inside)
