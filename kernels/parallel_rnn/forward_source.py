"""Emits the forward kernels of a cell: walk, mend, finish, decode (what they are for: kernels/parallel_rnn/codegen.py)."""

from __future__ import annotations

from kernels.parallel_rnn.trace import Traced
from kernels.parallel_rnn.writer import SIZES, STAGES, Writer, live


def steps(
    w: Writer, indent: int, product: str | None, stored: str = "go", even: str = "EVEN", meets: bool = True, curved: str = ""
) -> None:
    """One group of steps from h (and their products, where `product`, a condition, holds, and second derivatives, where `curved` does), states stored
    where `stored` holds, or all if `even`."""
    hs = w.each("h{i}", w.S)
    for u in range(w.U):
        w.put(indent, f"go = t + {u} < last", "if HAS_RESET:", *(f"    h{i} = tl.where(r{u} != 0, 0.0, h{i})" for i in w.S))
        plain = [f"{w.each('y{i}', w.S)} = {w.call('step', u, hs)}"]
        if product:
            w.put(indent, f"if {product}:")
            made, deep = f"{w.each('y{i}', w.S)}, {', '.join(w.matrix('j{i}{j}'))}", indent + 1
            if curved and u == w.U - 1:
                curves = ", ".join(f"f{i}{j}{k}" for i, j, k in w.curves)
                w.put(deep, f"if {curved}:", f"    {made}, {curves} = {w.call('step_and_curves', u, hs)}", "else:")
                deep += 1
            w.put(deep, f"{made} = {w.call('step_and_jacobian', u, hs)}")
            w.products(indent + 1, u)
            if product != "True":
                w.put(indent, "else:", *(f"    {line}" for line in plain))
        else:
            w.put(indent, *plain)
        w.put(indent, *(f"h{i} = _keep(go, y{i}, h{i}, EVEN)" for i in w.S))
        w.put(indent, *(f"_put({w.state(i, u)}, h{i}, {live(stored)}, {even})" for i in w.S))
    if product:
        w.put(indent, f"if {product}:")
        w.end_group(indent + 1, meets)
        if curved:
            w.put(indent + 1, f"if {curved}:")
            w.end_curves(indent + 2)


def _open(w: Writer) -> None:
    """Nothing walked yet, from h."""
    w.put(1, *(f"{x}{i}{j} = tl.full((BD,), {float(i == j)}, tl.float32)" for x in "JGR" for i in w.S for j in w.S))
    w.put(1, *(f"V{i} = tl.abs(h{i})" for i in w.S), *(f"L{i} = tl.zeros((BD,), tl.float32)" for i in w.S))
    w.put(1, "tail = first + SLICE // MARK * 7 // 8 * MARK  # walks may meet before, where the largest state of what follows is known")


def _enter(w: Writer, indent: int, t: str) -> None:
    """Pointers at step t."""
    w.put(indent, f"p = PRE + b * sb + {t}.to(tl.int64) * ST + _columns(tile, se, D, HEAD, BD)", f"q = RESET + b * T + {t}")
    w.state_pointers(indent, t)
    w.put(indent, f"mark = MARKS + (b * ((T + MARK - 1) // MARK) + {t} // MARK) * {len(w.S)} * D + d")
    w.load_resets(indent, "", t)


def _loop(w: Writer, indent: int, start: str, end: str, product: str | None, marks: str = "True", curved: str = "") -> None:
    """All groups of steps from `start` to `end`, pointers moving along."""
    w.put(indent, f"for t in tl.range({start}, {end}, {w.U}, num_stages={STAGES}):")
    w.load_tiles(indent + 1, "t")
    w.put(indent + 1, f"p += {w.U} * ST", f"q += {w.U}")
    w.load_resets(indent + 1, "n", f"t + {w.U}")
    steps(w, indent + 1, product, curved=curved)
    w.move(indent + 1, str(w.U))
    if marks != "True":
        w.put(indent + 1, f"if {marks}:")
    _marks(w, indent + 1 + (marks != "True"))
    w.next_resets(indent + 1)


def _marks(w: Writer, indent: int) -> None:
    w.put(indent, f"if ((t + {w.U}) % MARK == 0) | (t + {w.U} >= last):")
    w.put(indent + 1, *(f"tl.store(mark + {i} * D, h{i}, mask=inside)" for i in w.S), f"mark += {len(w.S)} * D")


def walk(traced: Traced, unroll: int) -> str:
    w, n_state = Writer(traced, unroll), len(traced.cell.state)
    w.begin(
        "walk",
        f"PRE, REC, H0, RESET, EMITTED, KEPT, MARKS, STARTS, ENDS, PRODUCTS, MEASURES, CURVES, GIVEN: tl.constexpr, PRODUCT: tl.constexpr, WITH_MARKS: tl.constexpr, CURVED: tl.constexpr,\n        {SIZES}",
    )
    w.weights()
    w.put(1, "first = s * SLICE", "last = tl.minimum(first + SLICE, T)", f"o = (b * n + s) * {n_state} * D + d")
    w.put(1, "if GIVEN:", *(f"    h{i} = {w.vector('STARTS', 'o', i)}" for i in w.S))
    known = live("s == 0")
    w.put(
        1,
        "else:  # slices start from zero, the first one from h0",
        *(f"    h{i} = {w.vector('H0', f'b * {n_state} * D + d', i, known)}" for i in w.S),
    )
    w.put(2, *(f"tl.store(STARTS + o + {i} * D, h{i}, mask=inside)" for i in w.S))
    _open(w)
    w.put(1, *(f"C{i}{j}{k} = tl.zeros((BD,), tl.float32)" for i, j, k in w.curves))
    _enter(w, 1, "first")
    _loop(w, 1, "first", "last", "PRODUCT", "WITH_MARKS", "CURVED" if w.curves else "")
    w.put(1, *(f"tl.store(ENDS + o + {i} * D, h{i}, mask=inside)" for i in w.S))
    w.put(1, "if PRODUCT:", *(f"    {line}" for line in _store_products(w)))
    w.store_measures(2)
    if w.curves:
        stores = [f"    tl.store(CURVES + oc + {at} * D, C{i}{j}{k}, mask=inside)" for at, (i, j, k) in enumerate(w.curves)]
        w.put(1, "if CURVED:", f"    oc = (b * n + s) * {len(w.curves)} * D + d", *stores)
    return w.text()


def _store_products(w: Writer, to: str = "PRODUCTS") -> list[str]:
    """J, and V after it: slices' starts depend on both, so that a round of mend reads the last one's while it writes its own."""
    n = len(w.S)
    return [f"oo = (b * n + s) * {n * n + n} * D + d", *w.matrix(f"tl.store({to} + oo + ({{i}} * {n} + {{j}}) * D, J{{i}}{{j}}, mask=inside)"),
            *(f"tl.store({to} + oo + {n * n + i} * D, V{i}, mask=inside)" for i in w.S)]  # fmt: skip


def _chain(w: Writer, indent: int, count: str, worst: bool, curved: str = "") -> None:
    """Newton's step on the slice starts, where `curved`, a condition, holds with the second order of their change (unless that is more than half of
    the first, where it says nothing): h, c become the corrected start of slice `count` and its change, z what a change of some earlier state
    by its own size would be there. With `worst` also, of each channel, the largest share of z that a change is, and the first slice where it is above the
    tolerance. Several slices are loaded at once."""
    n = len(w.S)
    group = range(max(1, 24 // (n * (n + 3))))
    w.put(indent, f"o = b * n * {n} * D + d", f"oo = b * n * {n * n + n} * D + d")
    w.put(indent, f"oc = b * n * {len(w.curves)} * D + d" if curved else "")
    w.put(
        indent,
        *(f"h{i} = {w.vector('STARTS', 'o', i)}" for i in w.S),
        *(f"{x}{i} = tl.zeros((BD,), tl.float32)" for x in "cz" for i in w.S),
    )
    w.put(indent, f"for k in range(0, {count}, {len(group)}):")
    deep = indent + 1
    for u in group:
        here = live(f"k + {u} < {count}")
        w.put(deep, *(f"e{i}_{u} = {w.vector('ENDS', 'o', u * n + i, here)}" for i in w.S))
        w.put(deep, *(f"a{i}_{u} = {w.vector('STARTS', 'o', (u + 1) * n + i, here)}" for i in w.S))
        w.put(
            deep,
            *w.matrix(f"j{{i}}{{j}}_{u} = tl.load(PRODUCTS + oo + ({u * (n * n + n)} + {{i}} * {n} + {{j}}) * D, mask={here}, other=0.0)"),
        )
        if curved:
            loads = [f"CURVES + oc + {u * len(w.curves) + at} * D, mask={here}, other=0.0" for at in range(len(w.curves))]
            w.put(deep, f"if {curved}:", *(f"    f{i}{j}{k}_{u} = tl.load({load})" for (i, j, k), load in zip(w.curves, loads)))
        w.put(deep, *(f"z{i}_{u} = tl.load(PRODUCTS + oo + {u * (n * n + n) + n * n + i} * D, mask={here}, other=0.0)" for i in w.S))
    for u in group:
        w.put(deep, *(f"m{i} = " + " + ".join(f"_times(j{i}{j}_{u}, c{j})" for j in w.S) for i in w.S))
        if curved:
            terms = {i: [f"f{i}{j}{k}_{u} * ({0.5 if j == k else 1.0} * c{j} * c{k})" for a, j, k in w.curves if a == i] for i in w.S}
            w.put(deep, f"if {curved}:", *(f"    q{i} = " + " + ".join(terms[i]) for i in w.S))
            w.put(deep + 1, *(f"m{i} += tl.where(tl.abs(q{i}) <= 0.5 * tl.abs(m{i}), q{i}, 0.0)" for i in w.S))
        w.put(
            deep,
            "fine = "
            + " & ".join(f"(tl.abs(m{i}) <= 3.0e38)" for i in w.S)
            + ("  # a slice whose start is unchanged has its exact end" if u == 0 else ""),
        )
        w.put(deep, *(f"k{i} = e{i}_{u} + tl.where(fine, m{i}, 0.0)" for i in w.S))
        w.put(deep, f"more = k + {u} < {count}")
        w.put(deep, *(f"h{i} = tl.where(more, k{i}, h{i})" for i in w.S), *(f"c{i} = tl.where(more, k{i} - a{i}_{u}, c{i})" for i in w.S))
        w.put(
            deep,
            *(f"m{i} = z{i}" for i in w.S),
            *w.left("m", f"j{{i}}{{j}}_{u}", "m{j}", f"z{{i}}_{u}"),
            *(f"z{i} = tl.where(more, m{i}, z{i})" for i in w.S),
        )
        if worst:
            w.shares(deep, "gap", "c{i}", "z{i}")
            w.put(deep, f"gap = tl.where({live('more')}, gap, 0.0)", "largest = tl.maximum(largest, gap)")
            w.put(deep, f"first_bad = tl.where((gap > TOLERANCE) & (first_bad == n), k + {u + 1}, first_bad)")
    w.put(deep, f"o += {len(group) * n} * D", f"oo += {len(group) * (n * n + n)} * D")
    w.put(deep, f"oc += {len(group) * len(w.curves)} * D" if curved else "")


def mend(traced: Traced, unroll: int) -> str:
    w, n = Writer(traced, unroll), len(traced.cell.state)
    own = "PRE, REC, RESET, EMITTED, KEPT, MARKS, STARTS, ENDS, PRODUCTS, NEW_STARTS, NEW_ENDS, NEW_PRODUCTS, MEASURES, CURVES, STATS, ROUND, TOLERANCE"
    w.begin("mend", f"{own}, STRETCH: tl.constexpr, CURVED: tl.constexpr,\n        {SIZES}", after=True)
    _chain(w, 1, "s", worst=False, curved="CURVED" if w.curves else "")
    w.shares(1, "gap", "c{i}", "z{i}")
    w.put(1, f"o = (b * n + s) * {n} * D + d", f"oo = (b * n + s) * {n * n + n} * D + d")
    old = [f"tl.load(PRODUCTS + oo + {k} * D, mask=inside, other=0.0)" for k in range(n * n + n)]
    w.put(1, "was = tl.max(tl.where(inside, gap, 0.0), 0)", "if was <= TOLERANCE:  # what this slice found stands")
    w.put(2, *(f"tl.store(NEW_STARTS + o + {i} * D, h{i} - c{i}, mask=inside)" for i in w.S))
    w.put(2, *(f"tl.store(NEW_ENDS + o + {i} * D, {w.vector('ENDS', 'o', i)}, mask=inside)" for i in w.S))
    w.put(2, *(f"tl.store(NEW_PRODUCTS + oo + {k} * D, {load}, mask=inside)" for k, load in enumerate(old)), "return")
    w.put(1, "tl.atomic_max(STATS + 1, ROUND)")
    w.weights()
    w.put(1, *(f"tl.store(NEW_STARTS + o + {i} * D, h{i}, mask=inside)" for i in w.S))
    w.put(1, "first = s * SLICE", "last = tl.minimum(first + SLICE, T)")
    _open(w)
    w.put(1, "span = STRETCH + 0 * first", "from_ = first", "met = 0 * first", "while (from_ < last) & (met == 0):")
    _enter(w, 2, "from_")  # anew for each stretch: pointers that a while loop carries are laid out otherwise than the loads want them
    w.put(2, "to = tl.minimum(tl.where(from_ + span <= tail, from_ + span, last), last)")
    w.put(2, "here = (to <= tail) & (to < last)  # where the old and the new walk have met here, the rest of the old one is right")
    seen = live("here")
    w.put(2, *(f"a{i} = {w.vector('mark', f'(span // MARK - 1) * {n} * D', i, seen)}" for i in w.S))
    _loop(w, 2, "from_", "to", "True")
    w.load_measures(2)  # not held over the loop, which needs the registers
    w.put(2, *(f"a{i} = a{i} - h{i}" for i in w.S))
    w.shares(2, "gap", "a{i}", "V{i}")
    if not traced.kinks:  # at a kink the slopes of one walk do not tell what comes of the other
        w.later_shares(2, "far", "a{i}")
        w.put(2, "gap = tl.minimum(gap, far)")
    w.put(2, "now = tl.max(tl.where(inside, gap, 0.0), 0)", "met = ((now <= TOLERANCE) & here).to(tl.int32)")
    w.put(2, "span, was, from_ = _next_span(span, was, now, TOLERANCE, MARK), now, to")
    w.put(1, *(f"h{i} = tl.where(met != 0, {w.vector('ENDS', 'o', i)}, h{i})" for i in w.S))
    w.put(1, *(f"tl.store(NEW_ENDS + o + {i} * D, h{i}, mask=inside)" for i in w.S))
    w.load_measures(1)
    w.put(
        1, *(f"G{i}{j} = tl.where(met != 0, _most(G{i}{j}, {w.product('oG{i}{m}', 'R{m}{j}', i, j)}), G{i}{j})" for i in w.S for j in w.S)
    )
    w.put(1, *(f"L{i} = tl.where(met != 0, oL{i}, L{i})" for i in w.S))
    w.store_measures(1)
    names = [*w.matrix("J{i}{j}"), *(f"V{i}" for i in w.S)]
    w.put(1, *(f"{name} = tl.where(met != 0, {load}, {name})" for name, load in zip(names, old)), *_store_products(w, "NEW_PRODUCTS"))
    return w.text()


def finish(traced: Traced, unroll: int) -> str:
    w, n = Writer(traced, unroll), len(traced.cell.state)
    own = "PRE, REC, RESET, EMITTED, KEPT, MARKS, STARTS, ENDS, PRODUCTS, FINAL, STATS, n, TOLERANCE"
    w.begin("finish", f"{own},\n        {SIZES}", sliced=False, after=True)
    w.put(1, "largest = tl.zeros((BD,), tl.float32)", "first_bad = tl.zeros((BD,), tl.int32) + n")
    _chain(w, 1, "n - 1", worst=True)
    w.put(1, "worst = tl.max(largest, 0)", "bad = tl.min(first_bad, 0)  # the first slice that does not start where the one before it ends")
    w.put(1, "tl.atomic_max(STATS + 0, worst)", "tl.atomic_add(STATS + 2, 1.0)")
    w.put(1, f"o = (b * n + n - 1) * {n} * D + d", f"final = FINAL + b * {n} * D + d")
    w.put(1, "if bad == n:", *(f"    tl.store(final + {i} * D, {w.vector('ENDS', 'o', i)}, mask=inside)" for i in w.S), "    return")
    w.put(1, "tl.atomic_add(STATS + 3, 1.0)")
    w.weights()
    w.put(1, f"o = (b * n + bad - 1) * {n} * D + d", *(f"h{i} = {w.vector('ENDS', 'o', i)}" for i in w.S))
    w.put(1, "first = bad * SLICE", "last = T")
    _enter(w, 1, "first")
    _loop(w, 1, "first", "last", None)
    w.put(1, *(f"tl.store(final + {i} * D, h{i}, mask=inside)" for i in w.S))
    return w.text()


def decode(traced: Traced) -> str:
    w = Writer(traced, 1)
    w.begin("decode", "PRE, REC, H, NEW, sb, sp, D: tl.constexpr, BD: tl.constexpr", sliced=False)
    w.put(1, f"o = b * {len(w.S)} * D + d")
    w.weights()
    w.put(1, *(f"x{k}_0 = tl.load(PRE + b * sb + {k} * sp + d, mask=inside, other=0.0)" for k in w.P))
    w.put(1, *(f"h{i} = tl.load(H + o + {i} * D, mask=inside, other=0.0).to(tl.float32)" for i in w.S))
    w.put(1, f"{w.each('y{i}', w.S)} = {w.call('step', 0, w.each('h{i}', w.S))}")
    w.put(1, *(f"tl.store(NEW + o + {i} * D, y{i}, mask=inside)" for i in w.S))
    return w.text()
