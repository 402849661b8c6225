"""Writes the kernels that go from slice to slice of a head and batch row: `correct`, which gives slices their starts, and `certify`
(source.py says what they are for, and has the names and the legend). Those of the adjoint go from the last slice to the first.
"""

from __future__ import annotations

from kernels.dense_rnn.source import JIT, SHARE_OF_FP32, Writer

CHAIN_STAGES = 4  # slices whose ends are on their way
AT_ONCE, MANY = 16, 48  # of more than so many slices those are looked at together of which most stand
CHAIN = "n, TOLERANCE, K: tl.constexpr, D: tl.constexpr, BK: tl.constexpr, DEPENDENT: tl.constexpr"


def _begin_chain(w: Writer) -> None:
    w.put(1, "b = tl.program_id(1).to(tl.int64)", "e = tl.program_id(0)", "k = tl.arange(0, BK)", "inside = k < K", "d = e * K + k")
    w.put(1, *(f"c{i} = tl.zeros((BK,), tl.float32)" for i in w.S), "worst = 0.0")


def _chain(w: Writer, back: bool, deep: int) -> None:
    """From slice to slice m: where it should begin (to), how far that is from where it did (c), and the share of its size that this is."""
    S, V = len(w.S), len(w.tracked)
    w.put(deep, "now, before = (b * n + n - 1 - m, b * n + n - m)" if back else "now, before = (b * n + m, b * n + m - 1)")
    for i in w.S:
        w.put(deep, f"end{i} = tl.load(ENDS + (before * {S} + {i}) * D + d, mask=inside, other=0.0)")
        w.put(deep, f"old{i} = tl.load(BEGINS + (now * {S} + {i}) * D + d, mask=inside, other=0.0)")
    for v, (i, j) in enumerate(w.tracked):
        w.put(deep, f"P{i}{j} = tl.load(PRODUCTS + (before * {V} + {v}) * D + d, mask=inside, other=0.0)")
    for i in w.S:
        terms = [f"_times(P{a}{c}, c{a if back else c})" for a, c in w.tracked if (c if back else a) == i]
        w.put(deep, f"more{i} = {' + '.join(terms) or 'c0 * 0.0'}", f"to{i} = end{i} + tl.where(tl.abs(more{i}) <= 3.0e38, more{i}, 0.0)")
    w.put(deep, "share = tl.zeros((BK,), tl.float32)")
    for i in w.S:
        w.put(deep, f"near{i} = tl.load(NEARBY + (before * {S} + {i}) * D + d, mask=inside, other=0.0)")
        if i in w.dense.cell.logs and not back:  # as reference.certified_size
            w.put(deep, f"near{i} = tl.maximum(1.0, near{i} * tl.minimum(1.0, {SHARE_OF_FP32} / TOLERANCE))")
        w.put(deep, f"c{i} = to{i} - old{i}", f"share = tl.maximum(share, _share(c{i}, near{i}))")
    w.put(deep, "gap = tl.max(tl.where(inside, share, 0.0), 0)", "stands = gap <= TOLERANCE", "worst = tl.maximum(worst, gap)")
    w.put(deep, *(f"c{i} = tl.where(stands, 0.0, c{i})" for i in w.S))


def _quiet(w: Writer, back: bool, where: str) -> None:
    """most: the largest share of slices j from `begin` on, if none of them nor the one before them moves. others: those that `where` is true of."""
    S = len(w.S)
    w.put(
        2,
        f"most, j = 3.0e38, begin + tl.arange(0, {AT_ONCE})",
        "others = j < 0",
        f"if (n > {MANY}) & (moving == 0):",
        "    there = (j < n)[:, None] & inside[None, :]",
    )
    w.put(3, "slices, ends = (b * n + n - 1 - j, b * n + n - j)" if back else "slices, ends = (b * n + j, b * n + j - 1)")
    w.put(3, f"shares = tl.zeros(({AT_ONCE}, BK), tl.float32)", "apart = shares != 0.0" if where else "")
    for i in w.S:
        w.put(3, f"place, old = (ends[:, None] * {S} + {i}) * D + d[None, :], (slices[:, None] * {S} + {i}) * D + d[None, :]")
        w.put(3, "change = tl.load(ENDS + place, mask=there, other=0.0) - tl.load(BEGINS + old, mask=there, other=0.0)")
        w.put(3, "near = tl.load(NEARBY + place, mask=there, other=0.0)")
        if i in w.dense.cell.logs and not back:
            w.put(3, f"near = tl.maximum(1.0, near * tl.minimum(1.0, {SHARE_OF_FP32} / TOLERANCE))")
        w.put(3, "shares = tl.maximum(shares, _share(change, near))", "apart = apart | (change != 0.0)" if where else "")
    w.put(3, "most = tl.max(tl.max(tl.where(there, shares, 0.0), 1), 0)", f"others = {where}" if where else "")


def _pieces(w: Writer, back: bool, at_once: bool, standing: str, where: str = "") -> None:
    """Opens the loop over slices m; at_once: within pieces, of those of which all slices stand only `standing` is done, with `others`."""
    if at_once:
        w.put(1, "moving = 0", f"for piece in tl.range(0, tl.cdiv(n - 1, {AT_ONCE})):", f"    begin = 1 + piece * {AT_ONCE}")
        w.put(2, f"end = tl.minimum(begin + {AT_ONCE}, n)")
        _quiet(w, back, where)
        w.put(2, "if most <= TOLERANCE:", "    worst = tl.maximum(worst, most)", f"    {standing}", "else:")
    w.put(3 if at_once else 1, f"for m in tl.range({'begin, end' if at_once else '1, n'}, num_stages={CHAIN_STAGES}):")


def correct(w: Writer, back: bool, at_once: bool = True) -> None:
    """at_once: many slices are looked at together; channels are few enough for that."""
    S, deep = len(w.S), 4 if at_once else 2
    name = "correct_back" if back else "correct"
    w.put(0, "", "", JIT, f"def {name}(BEGINS, ENDS, PRODUCTS, NEARBY, TODO, DONE, STATS, ROUND, {CHAIN}):")
    w.wait(short=True)
    w.put(1, "done = DONE + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)")
    w.put(1, "if ROUND > 1.0:  # what stood in the last round still does", "    if tl.load(done) > 0:", "        return")
    _begin_chain(w)
    _pieces(w, back, at_once, f"tl.store(TODO + (b * n + {'n - 1 - j' if back else 'j'}) * tl.num_programs(0) + e, 0, mask=j < n)")
    _chain(w, back, deep)
    w.put(
        deep,
        "tl.store(TODO + now * tl.num_programs(0) + e, tl.where(stands, 0, 1))",
        "move = inside & (gap + tl.zeros((BK,), tl.float32) > TOLERANCE)",
        "moving = tl.where(stands, 0, 1)" if at_once else "",
    )
    for i in w.S:
        w.put(deep, f"tl.store(BEGINS + (now * {S} + {i}) * D + d, to{i}, mask=move)")
    first = "n - 1" if back else "0"
    w.put(1, f"tl.store(TODO + (b * n + {first}) * tl.num_programs(0) + e, 0)")
    w.put(1, "tl.store(done, tl.where(worst > TOLERANCE, 0, 1))")
    w.put(1, "if worst > TOLERANCE:", "    tl.atomic_max(STATS + 1, ROUND)")


def certify(w: Writer, back: bool, joins: bool = True, at_once: bool = True) -> None:
    """BAD: the first slice that does not begin, bit for bit, where the one before it ends, or joins states that it is only near to, if some slice is
    not certified; else n."""
    S, deep = len(w.S), 4 if at_once else 2
    name = "certify_back" if back else "certify"
    w.put(0, "", "", JIT, f"def {name}(BEGINS, ENDS, PRODUCTS, NEARBY, {'JOINED, ' if joins else ''}BAD, FINAL, STATS, {CHAIN}):")
    w.wait(short=True)
    _begin_chain(w)
    w.put(1, "first = n")
    differ = "tl.max((apart & there).to(tl.int32), 1) > 0"
    joined = "tl.load(JOINED + slices * tl.num_programs(0) + e, mask=j < n, other=0) > 0"
    where = f"({differ}) | ({joined})" if joins else differ
    _pieces(w, back, at_once, "first = tl.minimum(first, tl.min(tl.where(others & (j < n), j, n), 0))", where)
    _chain(w, back, deep)
    differ = " | ".join(f"((end{i} != old{i}) & inside)" for i in w.S)
    w.put(
        deep,
        f"other = tl.max(({differ}).to(tl.int32), 0)",
        "other += tl.load(JOINED + now * tl.num_programs(0) + e)" if joins else "",
        "first = tl.where((other > 0) & (first == n), m, first)",
        "moving = tl.where(stands, 0, 1)" if at_once else "",
    )
    w.put(1, "bad = tl.where(worst > TOLERANCE, first, n)", "tl.store(BAD + b * tl.num_programs(0) + e, bad)")
    w.put(1, "tl.atomic_max(STATS + 0, worst)", "tl.atomic_add(STATS + 2, 1.0)", "tl.atomic_add(STATS + 3, (n - bad).to(tl.float32))")
    w.put(1, "tl.atomic_add(STATS + 4, n.to(tl.float32))")
    end = "b * n" if back else "b * n + n - 1"
    for i in w.S:
        w.put(1, f"end{i} = tl.load(ENDS + (({end}) * {S} + {i}) * D + d, mask=inside, other=0.0)")
        w.put(1, f"tl.store(FINAL + (b * {S} + {i}) * D + d, end{i}, mask=inside)")
