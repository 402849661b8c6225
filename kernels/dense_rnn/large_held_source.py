"""Large heads whose matrices stay in the multiprocessors' shared memory for a whole pass: kernels/dense_rnn/large_source.py and
large_backward_source.py otherwise, of cells that multiply one state alone (`held`).

Forwards each program loads its columns of the matrices, PIECES tiles of BK rows, before its first step, and reads the team's operands alone in each.

Backwards all columns of all products would be as many bytes of the matrices, but four times those of operands in each step. So M programs, one for
each product, share M BN columns: each multiplies the cotangents of its product with all of these columns, they exchange the sums (SUMS, at a barrier
of these M programs alone), and each goes on with its own BN channels. What a step reads besides comes while the first barrier is waited for, and what
no other program needs is computed and stored while the second one is.

COUNTER: of each team one for itself and one for each M programs, LINE apart. V: (2, products, rows, E KP), SUMS: (M, rows, E KP) in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

from kernels.dense_rnn.large_backward_source import (
    BACKWARD,
    begin_back,
    cut,
    gradients_out,
    jacobians,
    products_made,
    states_before,
    summed,
)
from kernels.dense_rnn.large_source import FORWARD, apart, begin, bounds, columns, end, head, inputs, near, padded, read_weights, reset
from kernels.dense_rnn.source import Writer, products_of_jacobians
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.products import Dense, is_leaf
from kernels.parallel_rnn.products import apart as parted

LINE = 32  # counters of four bytes in a line of the cache
HELPERS = f"""

@triton.jit
def _arrive(counter):  # what all threads wrote comes before it
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _wait(counter, target):  # until so many have arrived
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


LINE: tl.constexpr = tl.constexpr({LINE})
"""


def held(dense: Dense) -> bool:
    """Whether all that is multiplied is the last state, so that its cotangent enters that state's by an addition."""
    return len(dense.operands) == 1 and is_leaf(dense.operands[0], f"h{len(dense.cell.state) - 1}")


def _matrices(w: Writer, pieces: int, place: str, stride: str) -> None:
    """The tiles R0, R1 .. of a program."""
    w.put(3, place, *(f"R{i} = tl.load(m_ + {i} * BK * {stride})" for i in range(pieces)))


def _multiply(w: Writer, indent: int, pieces: int, source: str, M: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """sums: what lies at `source` for all of the team's channels times the tiles. It comes from the second-level cache, where others wrote it. All is
    on its way before the first product; a loop of one turn holds each product, as the compiler copies what is multiplied to shared memory where a
    loop's body receives it, tile by tile then, but what a load gave where it was loaded, all tiles at once. meanwhile: writes what is read while the last
    one is multiplied, when the others have left their registers."""
    w.put(indent, *(f"u{i} = tl.load({source} + {i} * BK, cache_modifier='.cg')" for i in range(pieces)))
    w.put(indent, f"sums = tl.zeros((BM, {M} * BN), tl.float32)", "once = tl.where(T > 0, 1, 0)", "turn_ = u0")
    for i in range(pieces):
        if i == pieces - 1:
            meanwhile()
        w.put(indent, "for _ in tl.range(0, once, num_stages=1):", f"    sums = tl.dot(turn_, R{i}, sums, input_precision=PRECISION)")
        w.put(indent + 1, f"turn_ = u{(i + 1) % pieces}")


def walk(w: Writer, pieces: int) -> None:
    S, deep, M = len(w.S), 4, padded(len(w.Q))
    head(w, "walk_held", FORWARD, back=False, weights=False)
    columns(w, 3, "columns", "se")
    w.put(3, "counter = COUNTER + team * LINE")
    begin(w, 3, "h", ("H0", "ENDS", "FINAL"), "s * SLICE <= BURN")
    bounds(w)
    _ahead(w, 4, "begin")
    _operand(w, 4, "parity")
    w.put(4, "if MODE == -2:", "    meetings += C", "    _arrive(counter)", "    _wait(counter, meetings)")
    _matrices(
        w,
        pieces,
        f"m_ = MAT + e * {M} * KP * KP + c * (KP * {M} * BN) + ks[:, None] * ({M} * BN) + tl.arange(0, {M} * BN)[None, :]",
        f"{M} * BN",
    )
    w.put(3, "for it in tl.range(begin, end, num_stages=1):")
    w.put(deep, "t = origin + it", "parity = (it + BURN) & 1", "live = here & (t >= 0) & (t < last)", "go = live[:, None]")
    w.put(deep, "both = go & inside", "at = b * T + t", "kept = both & (it >= 0)")
    w.put(deep, "if FIRST:", "    if it == 0:  # elsewhere nothing is brought into the order of memory")
    for i in w.S:
        w.keep(deep + 2, "BEGINS", "place", i, S, f"h{i}", "all_")
    w.put(deep + 1, *(f"P{i}{j} = tl.where(it == 0, {float(i == j)}, P{i}{j})" for i, j in w.tracked))
    inputs(w, deep, "t", "both", list(w.X))
    w.put(deep, "if HAS_RESET:")
    reset(w, deep + 1, "r", "t", "live")
    w.put(deep + 1, *(f"h{i} = tl.where(r, 0.0, h{i})" for i in w.S), "if FIRST:" if w.tracked else "")
    w.put(deep + 2, *(f"P{i}{j} = tl.where(r, 0.0, P{i}{j})" for i, j in w.tracked))
    _ahead(w, deep, "it + 1")
    w.put(deep, "u_ = U + parity.to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP + ks[None, :]")
    _multiply(w, deep, pieces, "u_", M, lambda: read_weights(w, deep))
    w.put(deep, *apart([f"p{i}" if i in w.Q else f"spare{i}_" for i in range(M)]))
    entries = [f"j{i}{j}" for i, j in w.tracked]
    w.put(deep, f"{', '.join([*(f'y{i}' for i in w.S), *entries])} = new_and_jacobian({w.given()})")
    w.put(deep, *(f"h{i} = tl.where(go, y{i}, h{i})" for i in w.S))
    _operand(w, deep, "1 - parity")
    w.put(deep, "if MODE == -2:", "    meetings += C", "    _arrive(counter)")
    w.put(deep, "if FIRST:" if w.tracked else "")
    products_of_jacobians(w, deep + 1, back=False)
    near(w, deep, "h", back=False)
    w.put(deep, f"tl.store(EMITTED + at[:, None] * D + d, h{S - 1}.to(EMITTED.dtype.element_ty), mask=kept)")
    w.put(deep, *(f"tl.store(KEPT + (at * {S - 1} + {i})[:, None] * D + d, h{i}, mask=kept)" for i in range(S - 1)))
    w.put(deep, "if MODE == -2:", "    _wait(counter, meetings)")
    end(w, "h", "FINAL", tracked="FIRST")


def _ahead(w: Writer, indent: int, it: str) -> None:
    """Whether a document starts at step `it`."""
    w.put(indent, "if HAS_RESET:", f"    tn = origin + {it}", "    ahead = here & (tn >= 0) & (tn < last)")
    reset(w, indent + 1, "rn", "tn", "ahead")


def _operand(w: Writer, indent: int, parity: str) -> None:
    """This program's share of the operand of the step that `_ahead` looked at."""
    w.put(indent, f"next_ = h{len(w.S) - 1}", "if HAS_RESET:", "    next_ = tl.where(rn, 0.0, next_)")
    w.put(indent, f"u_ = U + ({parity}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP")
    w.put(indent, "tl.store(u_ + k[None, :], next_.to(DOT), mask=all_)")


def walk_back(w: Writer, pieces: int) -> None:
    Q, M, deep, sums = len(w.Q), padded(len(w.Q)), 4, summed(w)
    head(w, "walk_back_held", BACKWARD.replace("LATER", "SUMS"), back=True, counts=("meetings", "exchanges"), weights=False)
    columns(w, 3, "columns", "se")
    columns(w, 3, "columns_out", "de")
    w.put(3, f"counter = COUNTER + team * (1 + C // {M}) * LINE", f"mates = counter + (1 + c // {M}) * LINE")
    begin_back(w, sums)
    _known(w, 4, "begin")
    _open(w, 4, "begin", "parity")
    w.put(3, f"mine = tl.minimum(c % {M}, {Q - 1})", f"wide = (c // {M}) * ({M} * BN) + tl.arange(0, {M} * BN)")
    _matrices(w, pieces, f"m_ = MAT + (e.to(tl.int64) * {Q} + mine) * KP * KP + ks[:, None] * KP + wide[None, :]", "KP")
    w.put(3, "for it in tl.range(begin, end, num_stages=1):", "    parity = (it + BURN) & 1", "    if (MODE == -2) | (MODE == 0):")
    w.put(deep + 1, f"v_ = V + (parity * {Q} + mine).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP + ks[None, :]")
    _multiply(w, deep + 1, pieces, "v_", M)
    w.put(
        deep + 1,
        f"s_ = SUMS + (c % {M}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP + wide[None, :]",
        "tl.store(s_, sums)",
    )
    w.put(deep + 1, "if MODE == -2:", f"    exchanges += {M}", "    _arrive(mates)")
    w.put(deep, "if (MODE == -2) | (MODE == 1):")
    _close(w, deep + 1)
    end(w, "a", "D_H0", sums, tracked="FIRST")


def functions_back(dense: Dense) -> list[str]:
    """A step's adjoint in two parts: what is known before there are cotangents, and what comes of it."""
    known, d_product, rest = parted(dense)
    names = {node: f"y{i}" for i, node in enumerate(known)}
    given = [*names.values(), *(a for a in dense.arguments if a[0] == "w"), *dense.cotangents]
    made = [function("known_before", dense.arguments, known, like="h0")]
    made.append(function("d_products_of", given, list(d_product), like="g0", given=names))
    made.append(function("gradients_of", given, list(rest), like="g0", given=names))
    return made


def _known(w: Writer, indent: int, it: str) -> None:
    """What step `it` reads but for the adjoint of the states after it: inputs, the states before it, its products, cotangents of what it gave; and what
    is computed of these alone, while sums are waited for."""
    n_kept = len(w.S) - 1
    w.put(
        indent, f"t = origin - ({it})", "live = here & (t >= low) & (t < T)", "go = live[:, None]", "both = go & inside", "at = b * T + t"
    )
    states_before(w, indent)
    read_weights(w, indent)
    w.put(indent, f"l{n_kept} = tl.load(D_EMITTED + at[:, None] * D + d, mask=both, other=0.0).to(tl.float32)")
    if n_kept:
        w.put(indent, "if WITH_KEPT:")
        for i in range(n_kept):
            w.put(indent + 1, f"l{i} = tl.load(D_KEPT + (at * {n_kept} + {i})[:, None] * D + d, mask=both, other=0.0).to(tl.float32)")
    products_made(w, indent)
    names = ", ".join(f"y{i}" for i in range(w.known))
    w.put(indent, f"{names} = known_before({w.given()})", "if FIRST:" if w.tracked else "")
    w.put(indent + 1, *(f"P{i}{j} = tl.where({it} == 0, {float(i == j)}, P{i}{j})" for i, j in w.tracked))
    jacobians(w, indent + 1)


def _open(w: Writer, indent: int, it: str, parity: str) -> None:
    """Begins step `it`, of which `_known` was read: the cotangents of its products, for the team; then, before the team has met, all the rest of it.
    a{i} is then the adjoint of the states before it, but for what its products bring."""
    sums, n_kept = summed(w), len(w.S) - 1
    w.put(indent, "if FIRST:", f"    if {it} == 0:")
    for i in w.S:
        w.keep(indent + 2, "BEGINS", "place", i, len(w.S), f"a{i}", "all_")
    w.put(indent + 1, *(f"W{i} = tl.where({it} == 0, 0.0, W{i})" for i in sums))
    w.put(indent, f"g{n_kept} = a{n_kept} + l{n_kept}", *(f"g{i} = a{i}" for i in range(n_kept)))
    w.put(indent, "if WITH_KEPT:" if n_kept else "", *(f"    g{i} += l{i}" for i in range(n_kept)))
    given = f"{w.known_before()}, {', '.join(f'g{i}' for i in w.S)}, zero"
    w.put(indent, "zero = tl.zeros((BM, BN), tl.float32)", f"{', '.join(f'dp{i}' for i in w.Q)} = d_products_of({given})")
    for i in w.Q:
        w.put(indent, f"v_ = V + (({parity}) * {len(w.Q)} + {i}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP")
        w.put(indent, f"tl.store(v_ + k[None, :], dp{i}.to(DOT), mask=all_)")
    w.put(indent, "if MODE == -2:", "    meetings += C", "    _arrive(counter)")
    w.put(
        indent,
        "kept = both & (t <= origin)[:, None]",
        f"to = D_PROD + ((e.to(tl.int64) * B * T + at) * ({len(w.Q)} * K))[:, None] + k[None, :]",
    )
    w.put(indent, *(f"tl.store(to + {i} * K, dp{i}.to(D_PROD.dtype.element_ty), mask=kept)" for i in w.Q))
    results = [f"dx{i}" for i in w.X] + [f"dw{i}" for i in w.W] + [f"dh{i}" for i in w.S]
    w.put(indent, f"{', '.join(results)} = gradients_of({given})")
    cut(w, indent)
    near(w, indent, "g", back=True, it=it)
    gradients_out(w, indent, sums)
    w.put(indent, "if MODE == -2:", "    _wait(counter, meetings)")


def _close(w: Writer, indent: int) -> None:
    """Adds what the products of step `it` bring, and begins the step before it."""
    last = f"a{len(w.S) - 1}"
    w.put(indent, "t = origin - it", "over = here & (t >= low) & (t < T)", "if HAS_RESET:")
    w.put(indent + 1, "over = over & (tl.load(RESET + b * T + t, mask=over, other=0) == 0)")
    _known(w, indent, "it + 1")
    w.put(indent, "if MODE == -2:", "    _wait(mates, exchanges)")
    w.put(indent, "s_ = SUMS + rows[:, None].to(tl.int64) * W + e * KP + k[None, :]", "far_ = (c * 0 + 1).to(tl.int64) * RT * W")
    terms = [f"tl.load(s_{f' + {i} * far_' if i else ''}, mask=all_, other=0.0, cache_modifier='.cg')" for i in w.Q]
    w.put(indent, f"q0 = {' + '.join(terms)}", f"{last} = tl.where(over[:, None], {last} + q0, {last})")
    _open(w, indent, "(it + 1)", "1 - parity")
