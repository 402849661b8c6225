"""The kernels of the adjoint, as kernels/dense_rnn/source.py writes them: each slice walked backwards, with the matrices transposed.

The states are known, so that of a step only R^T times the products' cotangents waits for the step after it. A step starts from the emitted
state before it. Its products are taken again, or, where R and R^T are too much for a multiprocessor, read from PROD (KNOWN). The gradient of the matrices is one batched product afterwards, of
the operands and D_PROD, the products' cotangents head by head (APART), or of D_PRE where these are the same. BEGINS are the adjoints
that enter slices at their right end, ENDS those that leave at the left; a{i} is the adjoint carried.
"""

from __future__ import annotations

from kernels.dense_rnn.source import begin_measures, by_pieces, keep_joined, measure, products_of_jacobians, slice_rows
from kernels.dense_rnn.writer import Writer

INPUTS = "PRE, REC, MAT, RESET, EMITTED, KEPT, H0, H0_EMITTED, PROD, D_EMITTED, D_KEPT, D_FINAL"
OUTPUTS = "D_PRE, D_PROD, PARTIAL, db, dt, dp, de"
FLAGS = "WITH_KEPT: tl.constexpr, SCALED: tl.constexpr, KNOWN: tl.constexpr, APART: tl.constexpr"


def early(w: Writer) -> bool:
    """Whether the gradients of all inputs are cotangents of products, all of one level: they are stored while those wait for the matrices."""
    return len(w.dense.levels) == 1 and sorted(w.as_inputs) == list(w.X)


def _store_inputs(w: Writer, indent: int, values: list[str]) -> None:
    w.put(indent, "to = D_PRE + (b * db + t.to(tl.int64) * dt)[:, None] + columns_out")
    w.store_all(indent, "to", "dp", [f"{value}.to(D_PRE.dtype.element_ty)" for value in values])


def _cotangents(w: Writer, indent: int, store: bool) -> None:
    """Cotangents of products and operands, from the last level on. store: and gradients of inputs, where these are the same."""
    dense = w.dense
    given, states = w.known_before(), [f"g{i}" for i in w.S]
    for l in reversed(range(len(dense.levels))):
        later = {i for level in dense.levels[l + 1 :] for i in level}
        q = [f"q{i}" if i in later else "g0" for i in range(len(dense.operands))]
        mine = dense.of_level(l)
        w.put(indent, f"{', '.join(f'dp{i}' for i in mine)} = d_products{l}({given}, {', '.join([*states, *q])})")
        w.put(indent, "if SCALED:  # to the middle of the range that 16 bits have")
        size = f"tl.abs(dp{mine[0]})"
        for i in mine[1:]:
            size = f"tl.maximum({size}, tl.abs(dp{i}))"
        w.put(
            indent + 1,
            f"size = tl.max({size}, {w.across})",
            "size = tl.where((size > 1.0e-37) & (size < 1.0e37), tl.exp2(-tl.floor(tl.log2(size))), 1.0)",
        )
        w.put(indent + 1, "size = size[:, None]")
        for i in mine:
            w.put(indent + 1, f"vp{i} = dp{i} * size")
        w.put(indent, "else:", *(f"    vp{i} = dp{i}" for i in mine), *(f"lp{i} = vp{i}.to(DOT)" for i in mine))
        w.put(indent, "if HALVES:", *(f"    vp{i} = (vp{i} - lp{i}.to(tl.float32)).to(DOT)" for i in mine))
        if store:
            _store_inputs(w, indent, [f"dp{w.as_inputs.index(x)}" for x in w.X])
        for operand in dense.levels[l]:
            terms = [w.dot(f"lp{i}", dense.products[i].matrix, back=True) for i in mine if dense.products[i].operand == operand]
            # two sums: products that add to one wait for one another, and the compiler makes one of more
            w.put(indent, *(f"s{place} = {term}" for place, term in enumerate(terms)))
            halves = [" + ".join(f"s{place}" for place in range(len(terms)) if place * 2 // len(terms) == half) for half in (0, 1)]
            w.put(indent, f"q{operand} = {' + '.join(f'({half})' for half in halves if half)}")
            low = [w.dot(f"vp{i}", dense.products[i].matrix, back=True) for i in mine if dense.products[i].operand == operand]
            w.put(indent, "if HALVES:", *(f"    q{operand} += {term}" for term in low))
            w.put(indent, "if SCALED:", f"    q{operand} = q{operand} / size")


def _known(w: Writer, indent: int, products: bool) -> None:
    """What step t of each row takes from inputs and states alone: y{i} of `known_values`, and in products of Jacobians its factor. Inputs are on their
    way steps ahead, resets one step ahead."""
    n_kept, entries = len(w.S) - 1, [f"j{i}{j}" for i, j in w.tracked]
    w.put(indent, "live = here & (t >= low) & (t < T)", "go, both, at = live[:, None], live[:, None] & inside, b * T + t")
    w.put(indent, "p_ = PRE + (b * sb + t.to(tl.int64) * st)[:, None] + columns")
    w.put(indent, *(f"x{i} = {w.load(f'p_ + {i} * sp')}" for i in w.X))
    # of the first step the initial state, by another address: added to what is read, it would have to be brought into the order that products lie in
    w.put(indent, "later, first_ = (t > 0)[:, None], b[:, None] * D")
    w.put(indent, "h_ = tl.where(later, EMITTED + (at - 1)[:, None] * D, H0_EMITTED + first_) + d")
    w.put(indent, f"h{n_kept} = tl.load(h_, mask=both, other=0.0).to(tl.float32)")
    if n_kept:
        w.put(indent, f"h_ = tl.where(later, KEPT + (at - 1)[:, None] * ({n_kept} * D), H0 + first_ * {n_kept + 1}) + d")
        w.put(indent, *(f"h{i} = {w.load(f'h_ + {i} * D')}" for i in range(n_kept)))
    w.put(indent, "if HAS_RESET:", "    r = (nr != 0)[:, None]", *(f"    h{i} = tl.where(r, 0.0, h{i})" for i in w.S))
    w.put(indent + 1, "nr = tl.load(RESET + at - 1, mask=here & (t > low) & (t <= T), other=0)")
    w.put(indent, "if KNOWN:", f"    q_ = PROD + ((e.to(tl.int64) * B * T + at) * ({len(w.Q)} * K))[:, None] + k[None, :]")
    w.put(indent + 1, *(f"p{i} = {w.load(f'q_ + {i} * K')}" for i in w.Q))
    starts = {i: f" + ({start})" for i, start in w.begins.items()}
    # and a product with nothing: what comes out of one lies as the others do, and is not computed once for each order that it is wanted in
    nothing = "tl.dot(tl.zeros((BM, 16), DOT), tl.zeros((16, BK), DOT), acc="
    w.put(indent + 1, *(f"p{i} = {nothing}p{i}{starts.get(i, '')}, input_precision=PRECISION)" for i in w.Q))
    w.put(indent, "else:")
    w.dots(indent + 1)
    w.put(indent, f"{', '.join(f'y{i}' for i in range(w.known))} = known_values({w.given()})")
    if entries and products:  # of states that are known, so that no correction changes them
        w.put(indent, "if FIRST:", f"    {', '.join(entries)} = jacobian({w.given()})")
        w.put(indent + 1, "if HAS_RESET:", *(f"    {j} = tl.where(r, 0.0, {j})" for j in entries))
        products_of_jacobians(w, indent + 1, back=True)


def _steps_back(w: Writer, indent: int, first: str, count: str, store: bool, pieces: bool = False) -> None:
    """Walks `count` steps from step `first` of each row on, backwards. pieces: with products of Jacobians where it is the first walk, piece by piece
    until the adjoints are those of before where it is a later one."""
    w.put(indent, f"t = {first}", "if HAS_RESET:", "    nr = tl.load(RESET + b * T + t, mask=here & (t >= low) & (t < T), other=0)")
    if not pieces:
        w.put(indent, f"for step_ in tl.range(0, {count}, num_stages=STAGES):")
        _step_back(w, indent + 1, store)
        return
    w.put(indent, "if FIRST or not JOINS:", f"    for step_ in tl.range(0, {count}, num_stages=STAGES):")
    _step_back(w, indent + 2, store, products=True)
    w.put(indent + 2, "if JOINS:", "    if (step_ + 1) % LOOK == 0:", "        piece = place * (SLICE // LOOK) + step_ // LOOK")
    for i in w.S:
        w.keep(indent + 4, "MARKS", "piece", i, len(w.S), f"a{i}", "here[:, None] & inside")
    w.put(indent, "else:", "    from_ = t")
    by_pieces(w, indent + 1, count, lambda deep: _step_back(w, deep, store, in_pieces=True), "a")


def _step_back(w: Writer, deep: int, store: bool, products: bool = False, in_pieces: bool = False) -> None:
    n_kept = len(w.S) - 1
    w.put(deep, "t = from_ - (m * LOOK + step_)" if in_pieces else "")
    _known(w, deep, products)
    w.put(deep, f"g{n_kept} = a{n_kept} + {w.load('D_EMITTED + at[:, None] * D + d')}")
    w.put(deep, *(f"g{i} = a{i}" for i in range(n_kept)), "if WITH_KEPT:" if n_kept else "")
    for i in range(n_kept):
        w.put(deep + 1, f"g{i} += {w.load(f'D_KEPT + (at * {n_kept} + {i})[:, None] * D + d')}")
    _cotangents(w, deep, store and early(w))
    cotangents = ", ".join([f"g{i}" for i in w.S] + [f"q{i}" for i in range(len(w.dense.operands))])
    results = [f"dx{i}" for i in w.X] + [f"dw{i}" for i in w.W] + [f"dh{i}" for i in w.S]
    w.put(deep, f"{', '.join(results)} = gradients({w.known_before()}, {cotangents})")
    if store:
        if products or in_pieces:  # of the walk of slices
            measure(w, deep, f"step_ >= {'steps' if in_pieces else 'SLICE'} - NEAR", "t < low + NEAR", "g", in_pieces, back=True)
        if not early(w):
            _store_inputs(w, deep, [f"dx{i}" for i in w.X])
        w.put(deep, "if APART:", f"    to = D_PROD + ((e.to(tl.int64) * B * T + at) * ({len(w.Q)} * K))[:, None] + k[None, :]")
        w.put(deep + 1, *(f"tl.store(to + {i} * K, dp{i}.to(D_PROD.dtype.element_ty), mask=both)" for i in w.Q))
        w.put(deep, *(f"W{i} += tl.where(go, dw{i}, 0.0)" for i in w.summed))
    w.put(deep, "if HAS_RESET:", *(f"    dh{i} = tl.where(r, 0.0, dh{i})" for i in w.S))
    w.put(deep, *(f"a{i} = tl.where(go, dh{i}, a{i})" for i in w.S), "" if in_pieces else "t -= 1")


def _ready(w: Writer) -> None:
    # they are held twice, once transposed: with more states than two there are no registers for both
    w.matrices("MAT", "R" if len(w.S) <= 2 else w.room)
    w.put(1, "columns = _columns(e, k, se, K, HEAD)[None, :]", "columns_out = _columns(e, k, de, K, HEAD)[None, :]")
    w.put(1, *(f"W{i} = tl.zeros((BM, BK), tl.float32)" for i in w.summed), "both = here[:, None] & inside")


def walk_back(w: Writer) -> None:
    S, V, R = len(w.S), len(w.tracked), len(w.summed)
    w.head(
        "walk_back",
        f"{INPUTS}, {OUTPUTS}, BEGINS, ENDS, PRODUCTS, NEARBY, TODO, MARKS, JOINED, JOIN, BURN, FIRST: tl.constexpr, JOINS: tl.constexpr, LOOK: tl.constexpr, {FLAGS}",
    )
    slice_rows(w)
    w.put(1, "if not FIRST:", "    todo = tl.load(TODO + place * E + e, mask=here, other=0)")
    w.put(2, "if tl.max(todo, 0) == 0:", "    return")
    _ready(w)
    w.put(1, "low = s * SLICE", "right = (s + 1) * SLICE")
    w.put(1, "if FIRST:", "    known = both & (right + BURN >= T)[:, None]  # those that begin at the last step")
    for i in w.S:
        w.put(2, f"a{i} = {w.vector('D_FINAL', 'b', i, S, 'known')}")
    _steps_back(w, 2, "right + BURN - 1", "BURN", store=False)
    w.put(2, "both = here[:, None] & inside")
    for i in w.S:
        w.keep(2, "BEGINS", "place", i, S, f"a{i}")
    w.put(1, "else:")
    for i in w.S:
        w.put(2, f"a{i} = {w.vector('BEGINS', 'place', i, S)}")
    begin_measures(w, 1)
    _steps_back(w, 1, "right - 1", "SLICE", store=True, pieces=True)
    w.put(1, "both = here[:, None] & inside")
    keep_joined(w, 1)
    for i in w.S:
        w.keep(1, "ENDS", "place", i, S, f"a{i}")
        w.keep(1, "NEARBY", "place", i, S, f"A{i}")
    w.put(1, "if FIRST:" if w.tracked else "")
    for v, (i, j) in enumerate(w.tracked):
        w.keep(2, "PRODUCTS", "place", v, V, f"P{i}{j}")
    for place, i in enumerate(w.summed):
        w.keep(1, "PARTIAL", "place", place, R, f"W{i}")


def finish_back(w: Writer) -> None:
    S, R = len(w.S), len(w.summed)
    w.head("finish_back", f"{INPUTS}, {OUTPUTS}, ENDS, BAD, D_H0, {FLAGS}")
    w.put(1, "b = rows.to(tl.int64)", "bad = tl.load(BAD + b * E + e, mask=rows < B, other=n)")
    w.put(1, "here = (rows < B) & (bad < n)", "earliest = tl.min(bad, 0)", "if earliest == n:", "    return")
    _ready(w)
    w.put(1, "low = tl.zeros_like(bad)", "both = here[:, None] & inside")
    for i in w.S:
        w.put(1, f"a{i} = {w.vector('ENDS', 'b * n + n - bad', i, S)}")
    _steps_back(w, 1, "(n - bad) * SLICE - 1", "(n - earliest) * SLICE", store=True)
    w.put(1, "both = here[:, None] & inside")
    for i in w.S:
        w.keep(1, "D_H0", "b", i, S, f"a{i}")
    if w.summed:
        w.put(1, "for m in range(0, n - earliest):  # the sums of all steps that were walked here lie at the first of their slices")
        for place, i in enumerate(w.summed):
            value = f"tl.where((m == n - 1 - bad)[:, None], W{i}, 0.0)"
            w.put(2, f"tl.store(PARTIAL + ((b * n + m) * {R} + {place})[:, None] * D + d, {value}, mask=both & (m < n - bad)[:, None])")
