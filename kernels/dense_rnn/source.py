"""Writes the Triton source of the kernels of a cell that is dense in its heads.

A program owns one head and BM rows; a row is a slice of time of a batch row, and each step multiplies the rows' operands with the head's
matrices, which stay on chip. Inputs of later steps are on their way meanwhile: Triton copies them to shared memory, STAGES steps deep, and
reads them there as the products lie in registers.

    walk      all slices: from zero with a burn-in (FIRST), or those again whose start was corrected, until they have come back to what they were
              (JOINS); states, ends, diagonal Jacobian products (TRACK)
    correct   quasi-Newton: new starts of slices, and which of them have to be walked again
    certify   the certificate: the first slice of a head and batch row that does not start where the one before it ends, if any is not right
    finish    walks in order what is not certified
    walk_back, correct_back, certify_back, finish_back   the same for the adjoint, backwards in time with the matrices transposed

Names in the text: x input projections, w weights, h states, p products, u operands, R matrices, g cotangents of new states, q of operands,
P{i}{j} products of Jacobians, A{i} the largest state near the slice's end, r whether the step's document is new, nr whether the next one's is.

Legend: n slices of SLICE steps, B batch rows, T steps, S states, D = E K channels in E heads; BK, BM: K and rows as powers of two.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from kernels.dense_rnn.writer import Writer
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.products import Dense, apart

HELPERS = """
@triton.jit
def _columns(e, k, se, K: tl.constexpr, HEAD: tl.constexpr):  # offsets of a head's channels in inputs that lie in blocks of HEAD
    if HEAD % K == 0:
        return (e * K // HEAD).to(tl.int64) * se + (tl.multiple_of(e * K % HEAD, K) + k)
    else:
        d = e * K + k
        return (d // HEAD).to(tl.int64) * se + d % HEAD


@triton.jit
def _share(change, size):  # no change is no share of anything, and what is not finite is too much
    share = tl.abs(change) / size
    return tl.where(change == 0.0, 0.0, tl.where(share <= 3.0e38, share, 3.0e38))


@triton.jit
def _times(J, x):  # nothing stays nothing, whatever it is multiplied with
    return tl.where((x == 0.0) | (J == 0.0), 0.0, J * x)


@triton.jit
def _held(p, BK: tl.constexpr, G: tl.constexpr):  # up to four matrices that lie side by side, to stay in registers
    k, g = tl.arange(0, BK), tl.arange(0, 4)[:, None, None]
    R = tl.load(p + k[None, :, None] * (G * BK) + g * BK + k[None, None, :], mask=g < G, other=0.0)
    even, odd = tl.split(tl.reshape(tl.permute(R, (1, 2, 0)), (BK, BK, 2, 2)))
    R0, R2 = tl.split(even)
    R1, R3 = tl.split(odd)
    return R0, R1, R2, R3
"""


def parts(dense: Dense, near: bool = False, small: bool = False) -> list[str]:
    """The step's functions between products. near: new states are rounded so coarsely that a tangent may be near to it. small: of small heads, whose
    products begin from what they are added to; their adjoint's functions take what `known_values` makes of inputs and states."""
    tracked, arguments, cotangents = Writer(dense).tracked, dense.arguments, dense.cotangents
    begun = {node: f"p{i}" for i, (_, node) in dense.begun.items()} if small else {}
    written = functools.partial(function, like="h0", given=begun)
    entries = [dense.jacobian[i][j] for i, j in tracked]
    made = [written(f"operands{l}", arguments, [dense.operands[i] for i in level]) for l, level in enumerate(dense.levels)]
    step = written("new_and_jacobian", arguments, [*dense.new, *entries])
    made.append(re.sub(r"\b_tanh\(", "_near_tanh(", step) if near else step)
    made += [written("jacobian", arguments, entries)] if entries else []
    d_product, rest = dense.d_product, (*dense.d_pre, *dense.d_rec, *dense.d_state)
    if small:
        known, d_product, rest = apart(dense)
        made.append(written("known_values", arguments, known))
        names = {node: f"y{i}" for i, node in enumerate(known)}
        written, arguments = functools.partial(function, like="g0", given=names), [*names.values(), *(a for a in arguments if a[0] == "w")]
    for l in range(len(dense.levels)):
        made.append(written(f"d_products{l}", [*arguments, *cotangents], [d_product[i] for i in dense.of_level(l)]))
    made.append(written("gradients", [*arguments, *cotangents], rest))
    return made


def products_of_jacobians(w: Writer, indent: int, back: bool) -> None:
    """P after a step with the Jacobian j: later factors on the left, or, backwards, earlier ones on the right."""
    tracked = w.tracked
    for i, j in tracked:
        factors = [(f"j{i}{m}", f"P{m}{j}") if not back else (f"P{i}{m}", f"j{m}{j}") for m in w.S]
        known = [(a, b) for a, b in factors if (int(a[1]), int(a[2])) in tracked and (int(b[1]), int(b[2])) in tracked]
        w.put(indent, f"k{i}{j} = {' + '.join(f'{a} * {b}' for a, b in known) or 'h0 * 0.0'}")
    w.put(indent, *(f"P{i}{j} = tl.where(go, k{i}{j}, P{i}{j})" for i, j in tracked))


def _steps(w: Writer, indent: int, first: str, count: str, store: bool, pieces: bool = False) -> None:
    """Walks `count` steps from step `first` of each row on. pieces: piece by piece, until the states are those of before."""
    w.put(indent, f"t = {first}", "from_ = t")
    w.put(indent, "if HAS_RESET:", "    nr = tl.load(RESET + b * T + t, mask=here & (t >= 0) & (t < last), other=0)")
    if not pieces:
        w.put(indent, f"for step_ in tl.range(0, {count}, num_stages=STAGES):")
        _step(w, indent + 1, store, False, False)
        return
    w.put(indent, "if FIRST or not JOINS:", f"    for step_ in tl.range(0, {count}, num_stages=STAGES):")
    _step(w, indent + 2, store, False, True)
    w.put(indent + 2, "if JOINS:", "    if (step_ + 1) % LOOK == 0:", "        piece = place * (SLICE // LOOK) + step_ // LOOK")
    for i in w.S:
        w.keep(indent + 4, "MARKS", "piece", i, len(w.S), f"h{i}", "here[:, None] & inside")
    w.put(indent + 1, "if EARLY:")
    _store_before(w, indent + 2, "h")
    w.put(indent, "else:")
    by_pieces(w, indent + 1, count, lambda deep: _step(w, deep, store, True, True), "h")
    w.put(indent + 1, "if EARLY:", f"    t = from_ + {count}", "    if joined == 0:  # where it joined, the state there stands as well")
    _store_before(w, indent + 3, "h")


def _store_before(w: Writer, indent: int, states: str) -> None:
    """Stores the states that step t starts from, of the steps before it: a step does so while its products are made (EARLY)."""
    w.put(indent, "done = (here & (t > from_) & (t <= last))[:, None] & inside")
    _store_states(w, indent, "(b * T + t - 1)", states, "done")


def _store_states(w: Writer, indent: int, at: str, states: str, mask: str) -> None:
    """Stores the states after the steps that lie at `at`."""
    n_kept = len(w.S) - 1
    w.put(indent, f"tl.store(EMITTED + {at}[:, None] * D + d, {states}{n_kept}.to(EMITTED.dtype.element_ty), mask={mask})")
    w.store_all(indent, f"KEPT + {at}[:, None] * ({n_kept} * D) + d", "D", [f"{states}{i}" for i in range(n_kept)], mask)


def by_pieces(w: Writer, indent: int, count: str, step: Callable[[int], None], states: str) -> None:
    """Steps in pieces; behind each the states are compared with those of the walk before. Once all of a program's are within JOIN of them, measured
    as at the borders of slices, what follows stands. joined: 0, or 1 where they are the same, or 2."""
    S, deep = len(w.S), indent + 1
    w.put(indent, "joined = 0", f"for m in tl.range(0, tl.cdiv({count}, LOOK)):")
    w.put(deep, f"steps = tl.where(joined > 0, 0, tl.minimum(LOOK, {count} - m * LOOK))")
    # read here, as nothing waits for them before all steps of the piece are made
    another = f"(m + 1) * LOOK + tl.zeros((BM, BK), tl.int32) < {count}"
    w.put(deep, f"piece, both = place * (SLICE // LOOK) + m, here[:, None] & inside & ({another})")
    w.put(deep, *(f"m{i}_ = {w.vector('MARKS', 'piece', i, S)}" for i in w.S))
    w.put(deep, *(f"C{i} = tl.zeros((BM, BK), tl.float32)" for i in w.S), "for step_ in tl.range(0, steps, num_stages=STAGES):")
    step(deep + 1)
    w.put(deep, f"if (joined == 0) & ((m + 1) * LOOK < {count}):")
    deep += 1
    w.put(deep, "both, share = here[:, None] & inside, tl.zeros((BM, BK), tl.float32)")
    for i in w.S:
        w.put(deep, f"near = tl.maximum(C{i}, tl.abs({states}{i}))")
        if i in w.dense.cell.logs and states == "h":  # as reference.certified_size
            w.put(deep, f"near = tl.maximum(1.0, near * tl.minimum(1.0, {SHARE_OF_FP32} / JOIN))")
        w.put(deep, f"share = tl.maximum(share, _share({states}{i} - m{i}_, near))")
    w.put(deep, "worst = tl.max(tl.where(both, share, 0.0))")
    w.put(
        deep,
        "joined = tl.where(worst <= JOIN, tl.where(worst > 0.0, 2, 1), 0)",
        "both = both & (joined + tl.zeros((BM, BK), tl.int32) == 0)",
    )
    for i in w.S:  # what follows goes on from where it did
        w.keep(deep, "MARKS", "piece", i, S, f"{states}{i}")


def keep_joined(w: Writer, indent: int) -> None:
    """JOINED: whether a slice's states join others which they are only near to. Then leaves `both` empty if what follows stands as it was."""
    w.put(indent, "if JOINS:", "    at_ = JOINED + place * E + e", "    if FIRST:", "        tl.store(at_, 0, mask=here)")
    w.put(
        indent + 1,
        "else:",
        "    how_ = joined + tl.zeros((BM,), tl.int32)",
        "    tl.store(at_, how_ // 2, mask=here & (how_ != 1))",
        "    both = both & (how_ == 0)[:, None]",
    )


def _step(w: Writer, deep: int, store: bool, pieces: bool, track: bool) -> None:
    """track: of the walk of slices, where products of Jacobians may be wanted and stores be EARLY. pieces: one of a piece, where t is counted anew: carried through two loops it would lie in one layout alone and change it in every step."""
    states = [f"y{i}" for i in w.S]
    entries = [f"j{i}{j}" for i, j in w.tracked]

    def early() -> None:
        w.put(deep, "if EARLY:")
        _store_before(w, deep + 1, "e")

    w.put(deep, "t = from_ + (m * LOOK + step_)" if pieces else "")
    w.put(deep, "live = here & (t >= 0) & (t < last)", "go, both, at = live[:, None], live[:, None] & inside, b * T + t")
    w.put(deep, "p_ = PRE + (b * sb + t.to(tl.int64) * st)[:, None] + columns")
    w.put(deep, *(f"x{i} = {w.load(f'p_ + {i} * sp')}" for i in w.X))
    if store and track:
        w.put(deep, "if EARLY:", *(f"    e{i} = h{i}" for i in w.S))
    w.put(deep, "if HAS_RESET:", "    r = (nr != 0)[:, None]", *(f"    h{i} = tl.where(r, 0.0, h{i})" for i in w.S))
    w.put(deep + 1, "nr = tl.load(RESET + at + 1, mask=here & (t >= -1) & (t + 1 < last), other=0)")
    if store:
        if track and w.tracked:
            w.put(deep, "if HAS_RESET and TRACK:", *(f"    P{i}{j} = tl.where(r & go, 0.0, P{i}{j})" for i, j in w.tracked))
    w.dots(deep, early if store and track else None)
    w.put(deep, f"{', '.join([*states, *entries])} = new_and_jacobian({w.given()})")
    w.put(deep, *(f"h{i} = tl.where(go, y{i}, h{i})" for i in w.S))
    if store:
        if track and w.tracked:
            w.put(deep, "if TRACK:")
            products_of_jacobians(w, deep + 1, back=False)
        if track:
            end = "steps" if pieces else "tl.minimum(SLICE, T - (n - 1) * SLICE)"
            measure(w, deep, f"step_ >= {end} - NEAR", "t >= last - NEAR", "h", pieces)
            w.put(deep, "if not EARLY:")
        _store_states(w, deep + int(track), "at", "h", "both")
    w.put(deep, "" if pieces else "t += 1")


def measure(w: Writer, indent: int, when: str, close: str, states: str, pieces: bool, back: bool = False) -> None:
    """A: the largest states of the last steps, where a row is `close` to its end; C: those of a piece. when: whether any row is, or all of a piece are;
    of the last slice of a batch row, which ends where time does and is followed by none, pieces leave A out."""
    names, deep = (["A", "C"] if pieces else ["A"]), indent + 1
    anew = [f"    {x}{i} = tl.where({'r & go' if back else 'r'}, 0.0, {x}{i})" for x in names for i in w.S]
    w.put(indent, f"if {when}:", f"    close = go & ({close})[:, None]")
    if not back:
        w.put(deep, "if HAS_RESET:", *anew)
    w.put(deep, *(f"A{i} = tl.where(close, tl.maximum(A{i}, tl.abs({states}{i})), A{i})" for i in w.S))
    if pieces:
        w.put(deep, *(f"C{i} = tl.where(go, tl.maximum(C{i}, tl.abs({states}{i})), C{i})" for i in w.S))
    if back:
        w.put(deep, "if HAS_RESET:", *anew)


def begin_measures(w: Writer, indent: int) -> None:
    w.put(indent, *(f"P{i}{j} = tl.zeros((BM, BK), tl.float32) + {float(i == j)}" for i, j in w.tracked))
    w.put(indent, *(f"A{i} = tl.zeros((BM, BK), tl.float32)" for i in w.S))


def _keep_measures(w: Writer, indent: int, states: str) -> None:
    S, V = len(w.S), len(w.tracked)
    w.put(indent, "both = here[:, None] & inside")
    keep_joined(w, indent)
    for i in w.S:
        w.keep(indent, "ENDS", "place", i, S, f"{states}{i}")
        w.keep(indent, "NEARBY", "place", i, S, f"A{i}")
    w.put(indent, "if TRACK:" if w.tracked else "")
    for v, (i, j) in enumerate(w.tracked):
        w.keep(indent + 1, "PRODUCTS", "place", v, V, f"P{i}{j}")


def slice_rows(w: Writer) -> None:
    """Rows are slices of batch rows."""
    w.put(1, "here = rows < B * n", "b = (rows // n).to(tl.int64)", "s = rows % n", "place = b * n + s")
    w.put(1, "both = here[:, None] & inside")


def walk(w: Writer) -> None:
    S = len(w.S)
    own = "PRE, REC, MAT, H0, RESET, EMITTED, KEPT, BEGINS, ENDS, PRODUCTS, NEARBY, TODO, MARKS, JOINED, JOIN, BURN, FIRST: tl.constexpr, TRACK: tl.constexpr, JOINS: tl.constexpr, LOOK: tl.constexpr, EARLY: tl.constexpr"
    w.head("walk", own)
    slice_rows(w)
    w.put(1, "if not FIRST:", "    todo = tl.load(TODO + place * E + e, mask=here, other=0)")
    w.put(2, "if tl.max(todo, 0) == 0:", "    return")
    w.matrices("MAT")
    w.put(1, "columns = _columns(e, k, se, K, HEAD)[None, :]", "last = tl.minimum((s + 1) * SLICE, T)")
    w.put(1, "if FIRST:", "    known = both & (s * SLICE <= BURN)[:, None]  # those that begin at the first step")
    for i in w.S:
        w.put(2, f"h{i} = {w.vector('H0', 'b', i, S, 'known')}")
    _steps(w, 2, "s * SLICE - BURN", "BURN", store=False)
    w.put(2, "both = here[:, None] & inside")
    for i in w.S:
        w.keep(2, "BEGINS", "place", i, S, f"h{i}")
    w.put(1, "else:")
    for i in w.S:
        w.put(2, f"h{i} = {w.vector('BEGINS', 'place', i, S)}")
    begin_measures(w, 1)
    _steps(w, 1, "s * SLICE", "SLICE", store=True, pieces=True)
    _keep_measures(w, 1, "h")


def finish(w: Writer) -> None:
    S = len(w.S)
    w.head("finish", "PRE, REC, MAT, RESET, EMITTED, KEPT, ENDS, BAD, FINAL")
    w.put(1, "b = rows.to(tl.int64)", "bad = tl.load(BAD + b * E + e, mask=rows < B, other=n)")
    w.put(1, "here = (rows < B) & (bad < n)", "earliest = tl.min(bad, 0)", "if earliest == n:", "    return")
    w.matrices("MAT")
    w.put(1, "columns = _columns(e, k, se, K, HEAD)[None, :]", "last = tl.zeros_like(bad) + T", "both = here[:, None] & inside")
    for i in w.S:
        w.put(1, f"h{i} = {w.vector('ENDS', 'b * n + bad - 1', i, S)}")
    _steps(w, 1, "bad * SLICE", "(n - earliest) * SLICE", store=True)
    w.put(1, "both = here[:, None] & inside")
    for i in w.S:
        w.keep(1, "FINAL", "b", i, S, f"h{i}")


SHARE_OF_FP32 = 2.0**-18  # reference.TOLERANCE of fp32
LOOK = 32  # steps after which a walk of corrected slices looks whether it has come back to the one before
