"""Large heads whose matrices stay in the multiprocessors' shared memory for a whole pass: kernels/dense_rnn/large_source.py and
large_backward_source.py otherwise, of cells that multiply one state alone (`held`).

Forwards each program loads its columns of the matrices, PIECES tiles of BK rows, before its first step, and reads the team's operands alone in each.

Backwards all columns of all products would be as many bytes of the matrices, but four times those of operands in each step. So M programs, one for
each product, share M BN columns: each multiplies the cotangents of its product with all of these columns, they exchange the sums (SUMS), and each goes
on with its own BN channels. What a step reads besides comes while the sums are waited for.

No step has a barrier: what programs exchange is its own message, in words of 32 bits. A word is EMPTY until it is written, and who reads it looks until
no word of all that it wants is. So a step waits for one way to the second-level cache and back, where a barrier takes three. Words are EMPTY again
before they are written again: operands and cotangents lie in four SLOTS, one step after the other, and their writer, who has seen all of step s, knows
that the whole team has read step s - 1; sums lie in two, and their only reader empties them. Either comes two steps before the place is written again,
with a fence between the two that is made while others are waited for. A pass ends with a barrier, behind which all slots are emptied.

COUNTER: of each team one, LINE apart. U: (SLOTS, rows, E KP), V: (SLOTS, products, rows, E KP), WORDS: their words; SUMS: (2, M, rows, E KP) in fp32, as
words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

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
SLOTS = 4
EMPTY = -1  # the largest word without a sign; two NaN of 16 bits or one of 32 that no instruction makes: a product's is 0x7FFFFFFF, a rounded one 0x7FFF, and 16 bits widened end in zeros
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


@triton.jit
def _fence():  # what a thread wrote comes before all that it writes from here on
    FENCE


@triton.jit
def _of_words(words, DOT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):  # the numbers that lie in words
    if DOT == tl.float32:
        return words.to(tl.float32, bitcast=True)
    else:
        both = tl.join((words & 0xFFFF).to(tl.int16), (words >> 16).to(tl.int16))
        return tl.reshape(both, (BM, BK)).to(DOT, bitcast=True)


LINE: tl.constexpr = tl.constexpr({LINE})
SLOTS: tl.constexpr = tl.constexpr({SLOTS})
EMPTY: tl.constexpr = tl.constexpr({EMPTY})
"""
FENCES = {
    "ptx": 'tl.inline_asm_elementwise("fence.acq_rel.gpu; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)',
    "portable": "tl.debug_barrier()",
}


def helpers(maths: str) -> str:
    return HELPERS.replace("FENCE", FENCES[maths])


def held(dense: Dense) -> bool:
    """Whether all that is multiplied is the last state, so that its cotangent enters that state's by an addition."""
    return len(dense.operands) == 1 and is_leaf(dense.operands[0], f"h{len(dense.cell.state) - 1}")


PACK = "PACK: tl.constexpr = 2 - (DOT == tl.float32)  # numbers in a word"


def _matrices(w: Writer, pieces: int, place: str, stride: str) -> None:
    """The tiles R0, R1 .. of a program."""
    w.put(3, place, *(f"R{i} = tl.load(m_ + {i} * BK * {stride})" for i in range(pieces)))


def _look(w: Writer, indent: int, places: list[str], names: list[str]) -> None:
    w.put(indent, *(f"{name} = tl.load({place}, mask=here[:, None], other=0, volatile=True)" for name, place in zip(names, places)))


def _wanted(w: Writer, indent: int, places: list[str], names: list[str]) -> None:
    """Reads words until none of them is EMPTY."""
    w.put(indent, "while missing:")
    _look(w, indent + 1, places, names)
    w.put(indent + 1, _missing(names))


def _missing(names: list[str]) -> str:
    """Whether a word is EMPTY."""
    largest = functools.reduce("tl.maximum({}, {})".format, (f"{name}.to(tl.uint32, bitcast=True)" for name in names))
    return f"missing = tl.max({largest}).to(tl.int32, bitcast=True) == EMPTY"


def _at(of: str, width: str) -> str:
    """Where the rows' shares of slot and product `of` begin, of so wide rows."""
    return f"({of}).to(tl.int64) * RT * ({width}) + rows[:, None].to(tl.int64) * ({width}) + e * (({width}) // E)"


def _multiply(w: Writer, indent: int, pieces: int, of: str, M: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """sums: what lies in WORDS at slot and product `of`, of all of the team's channels, times the tiles. Once the first tile is there, the others are
    wanted, which are by then, and come while it is multiplied: looking for all at once would read all of them in vain. A loop of one turn holds each
    product, as the compiler copies what is multiplied to shared memory where a loop's body receives it, tile by tile then, but what a load gave where
    it was loaded, all tiles at once. meanwhile: writes what is read while the last one is multiplied, when others have left their registers."""
    w.put(
        indent,
        f"words_ = WORDS + {_at(of, 'W // PACK')} + tl.arange(0, BK // PACK)[None, :]",
        f"sums = tl.zeros((BM, {M} * BN), tl.float32)",
    )
    w.put(indent, "n0 = tl.zeros((BM, BK // PACK), tl.int32)", "once = tl.where(T > 0, 1, 0)", "missing = once > 0")
    names, places = [f"n{i}" for i in range(pieces)], [f"words_ + {i} * (BK // PACK)" for i in range(pieces)]
    for i in range(pieces):
        _wanted(w, indent, places[i : i + 1], names[i : i + 1])
        if i == 0:
            _look(w, indent, places[1:], names[1:])
        if i == pieces - 1:
            meanwhile()
        w.put(indent, f"turn_ = _of_words(n{i}, DOT, BM, BK)", "for _ in tl.range(0, once, num_stages=1):")
        w.put(indent + 1, f"sums = tl.dot(turn_, R{i}, sums, input_precision=PRECISION)", "turn_ = tl.zeros((BM, BK), DOT)")
        w.put(indent, _missing(names[i + 1 : i + 2]) if i + 1 < pieces else "")


def _share(w: Writer, indent: int, name: str, of: str, value: str) -> None:
    """Stores this program's channels of an operand or a product's cotangents, zeros where the head is filled up, as words are whole."""
    w.put(indent, f"u_ = {name} + {_at(of, 'W')} + k[None, :]")
    w.put(indent, f"tl.store(u_, tl.where(inside, {value}, 0.0).to(DOT), mask=here[:, None])")


def _empty(w: Writer, indent: int, slot: str, count: int) -> None:
    """Empties what this program wrote to a slot, of `count` operands or products."""
    for i in range(count):
        w.put(
            indent,
            f"empty_ = WORDS + {_at(f'({slot}) * {count} + {i}', 'W // PACK')} + (c * (BN // PACK) + tl.arange(0, BN // PACK))[None, :]",
        )
        w.put(indent, "tl.store(empty_, EMPTY, mask=here[:, None])")


def _ends(w: Writer, count: int) -> None:
    """The end of a pass: nobody reads any more, and all slots are emptied."""
    w.put(3, "if MODE == -2:", "    meetings += C", "    _arrive(counter)", "    _wait(counter, meetings)")
    for slot in range(SLOTS):
        _empty(w, 4, f"c * 0 + {slot}", count)


def walk(w: Writer, pieces: int) -> None:
    S, deep, M = len(w.S), 4, padded(len(w.Q))
    head(w, "walk_held", FORWARD.replace("EARLIER", "WORDS"), back=False, weights=False)
    columns(w, 3, "columns", "se")
    w.put(3, PACK, "counter = COUNTER + team * LINE")
    begin(w, 3, "h", ("H0", "ENDS", "FINAL"), "s * SLICE <= BURN")
    bounds(w)
    _ahead(w, 4, "begin")
    _operand(w, 4, "begin")
    _matrices(
        w,
        pieces,
        f"m_ = MAT + e * {M} * KP * KP + c * (KP * {M} * BN) + ks[:, None] * ({M} * BN) + tl.arange(0, {M} * BN)[None, :]",
        f"{M} * BN",
    )
    w.put(3, "for it in tl.range(begin, end, num_stages=1):")
    w.put(deep, "t = origin + it", "live = here & (t >= 0) & (t < last)", "go = live[:, None]")
    w.put(deep, "both = go & inside", "at = b * T + t", "kept = both & (it >= 0)")
    w.put(deep, "if FIRST:", "    if it == 0:")
    for i in w.S:
        w.keep(deep + 2, "BEGINS", "place", i, S, f"h{i}", "all_")
    w.put(deep + 1, *(f"P{i}{j} = tl.where(it == 0, {float(i == j)}, P{i}{j})" for i, j in w.tracked))
    inputs(w, deep, "t", "both", list(w.X))
    w.put(deep, "if HAS_RESET:")
    reset(w, deep + 1, "r", "t", "live")
    w.put(deep + 1, *(f"h{i} = tl.where(r, 0.0, h{i})" for i in w.S), "if FIRST:" if w.tracked else "")
    w.put(deep + 2, *(f"P{i}{j} = tl.where(r, 0.0, P{i}{j})" for i, j in w.tracked))
    _ahead(w, deep, "it + 1")
    _multiply(w, deep, pieces, "(it + BURN) % SLOTS", M, lambda: read_weights(w, deep))
    w.put(deep, *apart([f"p{i}" if i in w.Q else f"spare{i}_" for i in range(M)]))
    entries = [f"j{i}{j}" for i, j in w.tracked]
    w.put(deep, f"{', '.join([*(f'y{i}' for i in w.S), *entries])} = new_and_jacobian({w.given()})")
    w.put(deep, *(f"h{i} = tl.where(go, y{i}, h{i})" for i in w.S))
    _operand(w, deep, "it + 1")
    _empty(w, deep, "(it + BURN + SLOTS - 1) % SLOTS", 1)
    w.put(deep, "if MODE == -2:", "    _fence()")
    w.put(deep, "if FIRST:" if w.tracked else "")
    products_of_jacobians(w, deep + 1, back=False)
    near(w, deep, "h", back=False)
    w.put(deep, f"tl.store(EMITTED + at[:, None] * D + d, h{S - 1}.to(EMITTED.dtype.element_ty), mask=kept)")
    w.put(deep, *(f"tl.store(KEPT + (at * {S - 1} + {i})[:, None] * D + d, h{i}, mask=kept)" for i in range(S - 1)))
    _ends(w, 1)
    end(w, "h", "FINAL", tracked="FIRST")


def _ahead(w: Writer, indent: int, it: str) -> None:
    """Whether a document starts at step `it`."""
    w.put(indent, "if HAS_RESET:", f"    tn = origin + {it}", "    ahead = here & (tn >= 0) & (tn < last)")
    reset(w, indent + 1, "rn", "tn", "ahead")


def _operand(w: Writer, indent: int, it: str) -> None:
    """This program's share of the operand of step `it`, at which `_ahead` looked."""
    w.put(indent, f"next_ = h{len(w.S) - 1}", "if HAS_RESET:", "    next_ = tl.where(rn, 0.0, next_)")
    _share(w, indent, "U", f"({it} + BURN) % SLOTS", "next_")


def walk_back(w: Writer, pieces: int) -> None:
    Q, M, deep, sums = len(w.Q), padded(len(w.Q)), 4, summed(w)
    head(w, "walk_back_held", BACKWARD.replace("LATER", "SUMS").replace("SCALES", "WORDS"), back=True, weights=False)
    columns(w, 3, "columns", "se")
    columns(w, 3, "columns_out", "de")
    w.put(3, PACK, "counter = COUNTER + team * LINE")
    begin_back(w, sums)
    _known(w, 4, "begin")
    _open(w, 4, "begin")
    w.put(3, f"mine = tl.minimum(c % {M}, {Q - 1})", f"wide = (c // {M}) * ({M} * BN) + tl.arange(0, {M} * BN)")
    _matrices(w, pieces, f"m_ = MAT + (e.to(tl.int64) * {Q} + mine) * KP * KP + ks[:, None] * KP + wide[None, :]", "KP")
    w.put(3, "for it in tl.range(begin, end, num_stages=1):", "    if (MODE == -2) | (MODE == 0):")
    _multiply(w, deep + 1, pieces, f"((it + BURN) % SLOTS) * {Q} + mine", M)
    place = _at(f"((it + BURN) % 2) * {M} + c % {M}", "W")
    w.put(deep + 1, f"tl.store(SUMS + {place} + wide[None, :], sums.to(tl.int32, bitcast=True), mask=here[:, None])")
    w.put(deep, "if (MODE == -2) | (MODE == 1):")
    _close(w, deep + 1)
    _ends(w, Q)
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


def _open(w: Writer, indent: int, it: str, taken: Sequence[str] = ()) -> None:
    """Begins step `it`, of which `_known` was read: the cotangents of its products, for the team; then, while those of the others come, the rest of it,
    the places of sums that were `taken` emptied first.
    a{i} is then the adjoint of the states before it, but for what its products bring."""
    sums, n_kept = summed(w), len(w.S) - 1
    w.put(indent, "if FIRST:", f"    if {it} == 0:  # elsewhere nothing is brought into the order of memory")
    for i in w.S:
        w.keep(indent + 2, "BEGINS", "place", i, len(w.S), f"a{i}", "all_")
    w.put(indent + 1, *(f"W{i} = tl.where({it} == 0, 0.0, W{i})" for i in sums))
    w.put(indent, f"g{n_kept} = a{n_kept} + l{n_kept}", *(f"g{i} = a{i}" for i in range(n_kept)))
    w.put(indent, "if WITH_KEPT:" if n_kept else "", *(f"    g{i} += l{i}" for i in range(n_kept)))
    given = f"{w.known_before()}, {', '.join(f'g{i}' for i in w.S)}, zero"
    w.put(indent, "zero = tl.zeros((BM, BN), tl.float32)", f"{', '.join(f'dp{i}' for i in w.Q)} = d_products_of({given})")
    for i in w.Q:
        _share(w, indent, "V", f"(({it} + BURN) % SLOTS) * {len(w.Q)} + {i}", f"dp{i}")
    _empty(w, indent, f"({it} + BURN + SLOTS - 2) % SLOTS", len(w.Q))
    w.put(indent, *(f"tl.store({place}, EMPTY, mask=here[:, None])" for place in taken), "if MODE == -2:", "    _fence()")
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


def _close(w: Writer, indent: int) -> None:
    """Adds what the products of step `it` bring, and begins the step before it."""
    last = f"a{len(w.S) - 1}"
    w.put(indent, "t = origin - it", "over = here & (t >= low) & (t < T)", "if HAS_RESET:")
    w.put(indent + 1, "over = over & (tl.load(RESET + b * T + t, mask=over, other=0) == 0)")
    _known(w, indent, "it + 1")
    M = padded(len(w.Q))
    w.put(indent, f"s_ = SUMS + {_at(f'((it + BURN) % 2) * {M}', 'W')} + k[None, :]", "far_ = (c * 0 + 1).to(tl.int64) * RT * W")
    places, names = [f"s_{f' + {i} * far_' if i else ''}" for i in w.Q], [f"n{i}" for i in w.Q]
    w.put(indent, *(f"{name} = tl.zeros((BM, BN), tl.int32)" for name in names), "missing = tl.where(T > 0, 1, 0) > 0")
    _wanted(w, indent, places, names)
    total = " + ".join(f"{name}.to(tl.float32, bitcast=True)" for name in names)
    w.put(indent, f"q0 = {total}", f"{last} = tl.where(over[:, None], {last} + q0, {last})")
    _open(w, indent, "(it + 1)", places)
