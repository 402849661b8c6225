"""Writes the kernels that go from slice to slice of a head and batch row: `correct`, which gives slices their starts, and `certify`
(source.py says what they are for, and has the names and the legend). Those of the adjoint go from the last slice to the first.
"""

from __future__ import annotations

from kernels.dense_rnn.source import JIT, SHARE_OF_FP32, Writer

CHAIN_STAGES = 4  # slices whose ends are on their way, the most
CHAIN = "n, TOLERANCE, K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, DEPENDENT: tl.constexpr"
WORST = "worst = tl.max(worst_, 0)"  # of all slices, behind _chain


def _given(joins: bool) -> str:
    """Arguments of a kernel. joins: of small heads, whose chains all fit."""
    return CHAIN if joins else f"{CHAIN}, STAGES: tl.constexpr"


def _chain(w: Writer, back: bool, joins: bool, measured: bool, slices: str = "n") -> None:
    """From slice to slice: where it should begin (to), how far that is from where it did (c), and whether that is too far (far). measured: and the share of
    its size that it is, which takes a division for each state."""
    S, V = len(w.S), len(w.tracked)
    w.put(1, "b = tl.program_id(1).to(tl.int64)", "e = tl.program_id(0)", "k = tl.arange(0, BK)", "inside = k < K", "d = e * K + k")
    w.put(1, *(f"c{i} = tl.zeros((BK,), tl.float32)" for i in w.S), "worst_ = tl.zeros((BK,), tl.float32)" if measured else "some = 0")
    w.put(1, f"for m in tl.range(1, {slices}, num_stages={CHAIN_STAGES if joins else 'STAGES'}):")
    w.put(2, "now, before = (b * n + n - 1 - m, b * n + n - m)" if back else "now, before = (b * n + m, b * n + m - 1)")
    for i in w.S:
        w.put(2, f"end{i} = tl.load(ENDS + (before * {S} + {i}) * D + d, mask=inside, other=0.0)")
        w.put(2, f"old{i} = tl.load(BEGINS + (now * {S} + {i}) * D + d, mask=inside, other=0.0)")
    for v, (i, j) in enumerate(w.tracked):
        w.put(2, f"P{i}{j} = tl.load(PRODUCTS + (before * {V} + {v}) * D + d, mask=inside, other=0.0)")
    for i in w.S:
        terms = [f"_times(P{a}{c}, c{a if back else c})" for a, c in w.tracked if (c if back else a) == i]
        w.put(2, f"more{i} = {' + '.join(terms) or 'c0 * 0.0'}", f"to{i} = end{i} + tl.where(tl.abs(more{i}) <= 3.0e38, more{i}, 0.0)")
    w.put(2, "share = tl.zeros((BK,), tl.float32)" if measured else "stands = k >= 0")
    for i in w.S:
        w.put(2, f"near{i} = tl.load(NEARBY + (before * {S} + {i}) * D + d, mask=inside, other=0.0)")
        if i in w.dense.cell.logs and not back:  # as reference.certified_size
            w.put(2, f"near{i} = tl.maximum(1.0, near{i} * tl.minimum(1.0, {SHARE_OF_FP32} / TOLERANCE))")
        close = f"(tl.abs(c{i}) <= TOLERANCE * near{i}) & (tl.abs(c{i}) <= 3.0e38)"  # which holds where the share is no larger, as TOLERANCE is a power of two
        w.put(
            2, f"c{i} = to{i} - old{i}", f"share = tl.maximum(share, _share(c{i}, near{i}))" if measured else f"stands = stands & {close}"
        )
    # the next slice waits for whether this one stands: a warp finds the largest of whole numbers in one instruction
    if measured:
        w.put(2, "share = tl.where(inside, share, 0.0)", "stands = share <= TOLERANCE", "worst_ = tl.maximum(worst_, share)")
    w.put(2, "far = tl.max(tl.where(stands, 0, 1), 0)", "" if measured else "some = tl.maximum(some, far)")
    w.put(2, *(f"c{i} = tl.where(far > 0, c{i}, 0.0)" for i in w.S))


def correct(w: Writer, back: bool, joins: bool = True) -> None:
    """joins: walks may end early, where they join states that are only near, so that a round's residual is not yet the certificate's."""
    S = len(w.S)
    name = "correct_back" if back else "correct"
    w.put(0, "", "", JIT, f"def {name}(BEGINS, ENDS, PRODUCTS, NEARBY, TODO, DONE, STATS, ROUND, {_given(joins)}):")
    w.wait(short=True)
    w.put(1, "done = DONE + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)")
    w.put(1, "if ROUND > 1.0:  # what stood in the last round still does", "    if tl.load(done) > 0:", "        return")
    _chain(w, back, joins, measured=not joins)
    w.put(
        2,
        "tl.store(TODO + now * tl.num_programs(0) + e, far)",
        "move = inside & (far + tl.zeros((BK,), tl.int32) > 0)",
    )
    for i in w.S:
        w.put(2, f"tl.store(BEGINS + (now * {S} + {i}) * D + d, to{i}, mask=move)")
    first = "n - 1" if back else "0"
    w.put(1, f"tl.store(TODO + (b * n + {first}) * tl.num_programs(0) + e, 0)")
    if joins:
        w.put(1, "tl.store(done, 1 - some)", "if some > 0:", "    tl.atomic_max(STATS + 1, ROUND)")
    else:
        w.put(1, WORST, "tl.store(done, tl.where(worst > TOLERANCE, 0, 1))")
        w.put(1, "if worst > TOLERANCE:", "    tl.atomic_max(STATS + 1, ROUND)", "else:", "    tl.atomic_max(STATS + 0, worst)")


def certify(w: Writer, back: bool, joins: bool = True) -> None:
    """BAD: the first slice that does not begin, bit for bit, where the one before it ends, or joins states that it is only near to, if some slice is
    not certified; else n."""
    S = len(w.S)
    name = "certify_back" if back else "certify"
    w.put(0, "", "", JIT, f"def {name}(BEGINS, ENDS, PRODUCTS, NEARBY, {'JOINED, ' if joins else ''}BAD, FINAL, STATS, {_given(joins)}):")
    w.wait(short=True)
    w.put(1, "first = n")
    if not joins:  # 1: the last round has found that all stand
        w.put(1, "slices = tl.where(tl.load(BAD + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) > 0, 1, n)")
    _chain(w, back, joins, True, "n" if joins else "slices")
    differ = " | ".join(f"((end{i} != old{i}) & inside)" for i in w.S)
    w.put(
        2,
        f"other = tl.max(({differ}).to(tl.int32), 0)",
        "other += tl.load(JOINED + now * tl.num_programs(0) + e)" if joins else "",
        "first = tl.where((other > 0) & (first == n), m, first)",
    )
    w.put(1, WORST, "bad = tl.where(worst > TOLERANCE, first, n)", "tl.store(BAD + b * tl.num_programs(0) + e, bad)")
    w.put(1, "tl.atomic_max(STATS + 0, worst)", "tl.atomic_add(STATS + 2, 1.0)", "tl.atomic_add(STATS + 3, (n - bad).to(tl.float32))")
    w.put(1, "tl.atomic_add(STATS + 4, n.to(tl.float32))")
    end = "b * n" if back else "b * n + n - 1"
    for i in w.S:
        w.put(1, f"end{i} = tl.load(ENDS + (({end}) * {S} + {i}) * D + d, mask=inside, other=0.0)")
        w.put(1, f"tl.store(FINAL + (b * {S} + {i}) * D + d, end{i}, mask=inside)")
