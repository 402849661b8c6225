"""Writes the Triton source of the kernels for heads whose matrices do not fit on a multiprocessor (kernels/dense_rnn/large.py launches them).

A team of programs walks BM rows of one head, a row being a slice of time of a batch row, and each program owns BN of the head's channels. A step is
a phase for each level of products: a program multiplies the operands of all the team's channels with its columns of the matrices, does all that
lies between products for its own channels, and writes its share of the next phase's operands; then the team meets at a barrier (`_meet`). All
programs of a launch are on the device at once, which a cooperative launch asserts. So a pass is one launch, and one with nothing to do ends at once.

    walk      all slices (FIRST: from zero with a burn-in, else those again whose start was corrected), or, in FINISH, what is not certified in order
    walk_back  the same for the adjoint, backwards in time with the matrices transposed (large_backward_source.py)

MODE -2 is a whole pass. In Triton's interpreter, where programs run one after the other, a launch is one phase: -1 what comes before the first
product, 0, 1 .. the phase of a level; what the others carry in registers then lies in ENDS, PRODUCTS, NEARBY, PARTIAL between launches.

Names are those of kernels/dense_rnn/source.py. U: operands as they enter products (2, operands, rows, E KP), V: cotangents of products, of even and
odd steps; KP: K filled up to whole tiles; MAT: matrices cut into the columns of programs (`large.forward_tiles`); it: steps since the slice's start,
or, backwards, since its end, negative in the burn-in.
"""

from __future__ import annotations

from kernels.dense_rnn import source as narrow
from kernels.dense_rnn.source import Writer, products_of_jacobians
from kernels.parallel_rnn.graph import order
from kernels.parallel_rnn.products import Dense

HELPERS = (
    narrow.HELPERS
    + """

@triton.jit
def _columns_of(begin, stride, K: tl.constexpr, HEAD: tl.constexpr, BN: tl.constexpr):  # offsets of BN channels that lie in blocks of HEAD
    if (HEAD % BN == 0) & (K % BN == 0):  # one block, and single loads where the compiler does not see it
        return (begin // HEAD).to(tl.int64) * stride + (tl.multiple_of(begin % HEAD, BN) + tl.arange(0, BN))
    else:
        d = begin + tl.arange(0, BN)
        return (d // HEAD).to(tl.int64) * stride + d % HEAD


@triton.jit
def _meet(counter, target):  # all programs of a team, at the barrier that `target` arrivals pass
    tl.debug_barrier()  # what all threads wrote comes before the arrival
    seen = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
"""
)
SIZES = "COUNTER, first, teams, T, SLICE, n, B, RT, sb, st, sp, se, BURN, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr"
FLAGS = "HEAD: tl.constexpr, NEAR: tl.constexpr, FIRST: tl.constexpr, FINISH: tl.constexpr, MODE: tl.constexpr, HAS_RESET: tl.constexpr"
WIDTHS = "DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr"
FORWARD = "PRE, REC, MAT, H0, RESET, EMITTED, KEPT, BEGINS, ENDS, PRODUCTS, NEARBY, TODO, BAD, FINAL, U, EARLIER"


def padded(count: int) -> int:
    """The power of two that holds so many matrices side by side."""
    return 1 << (count - 1).bit_length()


def of_operand(dense: Dense, operand: int) -> list[int]:
    """The products of an operand."""
    return [i for i, product in enumerate(dense.products) if product.operand == operand]


def places(dense: Dense) -> list[int]:
    """Where each operand's matrices begin in MAT, in units of E KP KP elements."""
    sizes = [padded(len(of_operand(dense, i))) for i in range(len(dense.operands))]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def bias_of(dense: Dense, r: int) -> int | None:
    """The input projection that weight r is added to and does nothing else with."""
    return next((k for k, d in enumerate(dense.d_pre) if d is dense.d_rec[r]), None)


def head(w: Writer, name: str, own: str, back: bool, counts: tuple[str, ...] = ("meetings",), weights: bool = True) -> None:
    """Teams take one group of rows of a head after the other. weights: they are read once."""
    w.put(0, "", "", "@triton.jit", f"def {name}({own},", f"        {SIZES},", f"        {FLAGS},", f"        {WIDTHS}):")
    w.put(1, "C: tl.constexpr = KP // BN", "D: tl.constexpr = E * K", "W: tl.constexpr = E * KP")
    w.put(1, "team = tl.program_id(0) // C", "c = tl.program_id(0) % C", "k = c * BN + tl.arange(0, BN)", "inside = (k < K)[None, :]")
    w.put(1, "ks = tl.arange(0, BK)", *(f"{name} = 0" for name in counts), "if FINISH:", "    groups = E * tl.cdiv(B, BM)", "else:")
    w.put(2, "groups = E * tl.cdiv(B * n, BM)")
    w.put(1, "for group in tl.range(team, groups, teams, num_stages=1):")
    w.put(2, "e = group % E", "rows = (group // E) * BM + tl.arange(0, BM)", "d = (e * K + k)[None, :]", "low = tl.zeros_like(rows)")
    w.put(2, "last = low + T", "if FINISH:", "    b = rows.to(tl.int64)", "    bad = tl.load(BAD + b * E + e, mask=rows < B, other=n)")
    w.put(3, "here = (rows < B) & (bad < n)", "earliest = tl.min(bad, 0)", "work = earliest < n", "steps = (n - earliest) * SLICE")
    w.put(
        3,
        "origin = (n - bad) * SLICE - 1" if back else "origin = bad * SLICE",
        "from_ = b * n + n - bad" if back else "from_ = b * n + bad - 1",
    )
    w.put(3, "place = b", "own = b * n + n - 1 - bad" if back else "")
    w.put(2, "else:", "    here = rows < B * n", "    b = (rows // n).to(tl.int64)", "    s = rows % n", "    place = rows.to(tl.int64)")
    w.put(
        3, "from_ = place", "steps = SLICE", "origin = (s + 1) * SLICE - 1" if back else "origin = s * SLICE", "own = place" if back else ""
    )
    w.put(3, "low = s * SLICE" if back else "last = tl.minimum((s + 1) * SLICE, T)", "work = True", "if not FIRST:")
    w.put(4, "work = tl.max(tl.load(TODO + place * E + e, mask=here, other=0), 0) > 0")
    w.put(2, "if work:", "    all_ = here[:, None] & inside")
    if weights:
        read_weights(w, 3)


def read_weights(w: Writer, indent: int) -> None:
    w.put(indent, *(f"w{r} = tl.load(REC + {r} * D + d, mask=inside, other=0.0)" for r in w.W))


def columns(w: Writer, indent: int, name: str, stride: str) -> None:
    """Offsets of a program's channels in inputs that lie in blocks of HEAD."""
    w.put(indent, f"{name} = _columns_of(e * K + c * BN, {stride}, K, HEAD, BN)[None, :]")


def meet(w: Writer, indent: int) -> None:
    w.put(indent, "if MODE == -2:", "    meetings += 1", "    _meet(COUNTER + team, meetings * C)")


def reset(w: Writer, indent: int, name: str, t: str, live: str) -> None:
    w.put(indent, f"{name} = (tl.load(RESET + b * T + {t}, mask={live}, other=0) != 0)[:, None]")


def inputs(w: Writer, indent: int, t: str, mask: str, which: list[int]) -> None:
    if which:
        w.put(indent, f"p_ = PRE + (b * sb + {t}.to(tl.int64) * st)[:, None] + columns")
        w.put(indent, *(f"x{i} = tl.load(p_ + {i} * sp, mask={mask}, other=0.0).to(tl.float32)" for i in which))


def _leaves(w: Writer, level: int) -> set[str]:
    return {n.arguments[0] for n in order([w.dense.operands[i] for i in w.dense.levels[level]]) if n.op == "var"}


def _operands(w: Writer, indent: int, level: int, parity: str, states: str, known: list[int]) -> None:
    """This program's share of a level's operands."""
    dense, needed = w.dense, _leaves(w, level)
    arguments = [f"x{i}" if f"x{i}" in needed else f"{states}0" for i in w.X] + [f"w{i}" for i in w.W] + [f"{states}{i}" for i in w.S]
    arguments += [f"p{i}" if i in known else f"{states}0" for i in w.Q]
    level_operands = dense.levels[level]
    w.put(indent, f"{', '.join(f'u{i}' for i in level_operands)} = operands{level}({', '.join(arguments)})")
    for i in level_operands:
        w.put(
            indent, f"u_ = U + (({parity}) * {len(dense.operands)} + {i}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP"
        )
        w.put(indent, f"tl.store(u_ + k[None, :], u{i}.to(DOT), mask=all_)")


def _multiply(w: Writer, indent: int, level: int) -> None:
    """A level's products, of the operands that the whole team wrote."""
    dense, at = w.dense, places(w.dense)
    for operand in dense.levels[level]:
        mine = of_operand(dense, operand)
        M = padded(len(mine))
        w.put(indent, f"u_ = U + (parity * {len(dense.operands)} + {operand}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W")
        w.put(
            indent, "u_ += e * KP + ks[None, :]", f"m_ = MAT + ({at[operand]} * E + e * {M}).to(tl.int64) * KP * KP + c * (KP * {M} * BN)"
        )
        w.put(indent, f"m_ += ks[:, None] * ({M} * BN) + tl.arange(0, {M} * BN)[None, :]", f"sums = tl.zeros((BM, {M} * BN), tl.float32)")
        w.put(indent, "for at_ in tl.range(0, KP, BK, num_stages=STAGES):")
        w.put(indent + 1, f"sums = tl.dot(tl.load(u_ + at_), tl.load(m_ + at_ * ({M} * BN)), sums, input_precision=PRECISION)")
        names = [f"p{mine[m]}" if m < len(mine) else f"spare{m}_" for m in range(M)]
        w.put(indent, *apart(names))


def apart(names: list[str]) -> list[str]:
    """Takes columns that lie side by side, matrix by matrix, apart."""
    if len(names) == 1:
        return [f"{names[0]} = sums"]
    bits = len(names).bit_length() - 1
    shape = ", ".join(["BM", *["2"] * bits, "BN"])
    turned = ", ".join(map(str, [0, bits + 1, *range(1, bits + 1)]))
    lines, pieces = [f"piece_ = tl.permute(tl.reshape(sums, ({shape})), ({turned}))"], {"": "piece_"}
    for depth in range(bits):  # split takes the last, the lowest bit
        split: dict[str, str] = {}
        for bit, name in pieces.items():
            split |= {f"0{bit}": f"piece0{bit}_", f"1{bit}": f"piece1{bit}_"}
            targets = [names[int(b, 2)] if depth == bits - 1 else split[b] for b in (f"0{bit}", f"1{bit}")]
            lines.append(f"{', '.join(targets)} = tl.split({name})")
        pieces = split
    return lines


def between(w: Writer, indent: int, target: str, names: list[str], of: int, load: bool) -> None:
    """Values that a later phase of the step reads."""
    for name in names:
        place = f"{target} + ((place * {of} + {name[1:]})[:, None]) * D + d"
        w.put(indent, f"{name} = tl.load({place}, mask=all_, other=0.0)" if load else f"tl.store({place}, {name}, mask=all_)")


def products(w: Writer, indent: int, load: bool) -> None:
    V = len(w.tracked)
    for v, (i, j) in enumerate(w.tracked):
        if load:
            w.put(indent, f"P{i}{j} = {w.vector('PRODUCTS', 'place', v, V, 'all_')}")
        else:
            w.keep(indent, "PRODUCTS", "place", v, V, f"P{i}{j}", "all_")


def _fresh(w: Writer, indent: int) -> None:
    w.put(indent, *(f"P{i}{j} = tl.zeros((BM, BN), tl.float32) + {float(i == j)}" for i, j in w.tracked))


def near(w: Writer, indent: int, values: str, back: bool, it: str = "it") -> None:
    """The largest values near the slice's end, which are kept in memory, as few steps need them. it: the step."""
    w.put(indent, "if not FINISH:", f"    if {it} >= tl.maximum(SLICE - NEAR, 0):")
    passed = "origin - t" if back else "t - origin"
    w.put(indent + 2, f"more = all_ & (({passed} > 0) & ({passed} > SLICE - NEAR))[:, None]")
    for i in w.S:
        w.put(indent + 2, f"A{i} = {w.vector('NEARBY', 'place', i, len(w.S), 'more')}")
        if not back:
            w.put(indent + 2, "if HAS_RESET:", f"    A{i} = tl.where(r, 0.0, A{i})")
        w.put(indent + 2, f"A{i} = tl.where(go, tl.maximum(A{i}, tl.abs({values}{i})), A{i})")
        if back:
            w.put(indent + 2, "if HAS_RESET:", f"    A{i} = tl.where(r & go, 0.0, A{i})")
        w.keep(indent + 2, "NEARBY", "place", i, len(w.S), f"A{i}", "all_")


def begin(w: Writer, indent: int, letter: str, sources: tuple[str, str, str], known: str) -> None:
    """The states, or adjoints, that rows begin with: of a first pass, of a repeated one, and between launches of phases."""
    S = len(w.S)
    given, carried, finished = sources
    w.put(indent, "if MODE < 0:", "    if FINISH:", *(f"        {letter}{i} = {w.vector('ENDS', 'from_', i, S, 'all_')}" for i in w.S))
    w.put(indent + 1, "elif FIRST:", f"    known = all_ & ({known})[:, None]")
    w.put(indent + 2, *(f"{letter}{i} = {w.vector(given, 'b', i, S, 'known')}" for i in w.S))
    w.put(indent + 1, "else:", *(f"    {letter}{i} = {w.vector('BEGINS', 'place', i, S, 'all_')}" for i in w.S))
    _fresh(w, indent + 1)
    w.put(indent, "else:", "    if FINISH:", *(f"        {letter}{i} = {w.vector(finished, 'place', i, S, 'all_')}" for i in w.S))
    _fresh(w, indent + 2)
    w.put(indent + 1, "else:", *(f"    {letter}{i} = {w.vector(carried, 'place', i, S, 'all_')}" for i in w.S))
    products(w, indent + 2, load=True)


def bounds(w: Writer) -> None:
    """The steps that a launch walks, and what must be opened before the first of them."""
    w.put(3, "begin, end = first, first + 1", "if MODE == -1:", "    end = begin", "if MODE == -2:", "    begin, end = first, steps")
    w.put(3, "if MODE < 0:", "    parity = (begin + BURN) & 1")


def end(w: Writer, letter: str, finished: str, sums: tuple[int, ...] = (), tracked: str = "") -> None:
    """Where states, or adjoints, and what was summed over steps lie when a row's walk has ended: `finished`, or for the next launch. tracked: on what
    condition there are products of Jacobians."""
    S, R = len(w.S), len(w.W)
    w.put(3, "if FINISH:")
    for i in w.S:
        w.keep(4, finished, "place", i, S, f"{letter}{i}", "all_")
    if sums:
        w.put(4, "for m in range(0, n - earliest):  # the sums of all steps that were walked here lie at the first of their slices")
        for i in sums:
            value = f"tl.where((m == n - 1 - bad)[:, None], W{i}, 0.0)"
            w.put(5, f"tl.store(PARTIAL + ((b * n + m) * {R} + {i})[:, None] * D + d, {value}, mask=all_ & (m < n - bad)[:, None])")
    w.put(3, "else:")
    for i in w.S:
        w.keep(4, "ENDS", "place", i, S, f"{letter}{i}", "all_")
    w.put(4, f"if {tracked}:" if tracked and w.tracked else "")
    products(w, 4 + bool(tracked), load=False)
    for i in sums:
        w.keep(4, "PARTIAL", "own", i, R, f"W{i}", "all_")


def walk(w: Writer) -> None:
    dense, deep = w.dense, 4
    head(w, "walk", FORWARD, back=False)
    columns(w, 3, "columns", "se")
    begin(w, 3, "h", ("H0", "ENDS", "FINAL"), "s * SLICE <= BURN")
    bounds(w)
    _next_operands(w, 4, "begin", "parity")
    meet(w, 4)
    w.put(3, "for it in tl.range(begin, end, num_stages=1):")
    w.put(deep, "t = origin + it", "parity = (it + BURN) & 1", "live = here & (t >= 0) & (t < last)", "go = live[:, None]")
    w.put(deep, "both = go & inside", "at = b * T + t", "kept = both & (it >= 0)")
    for l in range(len(dense.levels)):
        w.put(deep, f"if (MODE == -2) | (MODE == {l}):")
        _phase(w, deep + 1, l)
        meet(w, deep + 1)
    end(w, "h", "FINAL")


def _next_operands(w: Writer, indent: int, it: str, parity: str) -> None:
    """The first operands of a step, of states that are zeroed where a document starts there."""
    needed = _leaves(w, 0)
    w.put(indent, f"tn = origin + {it}", "ahead = here & (tn >= 0) & (tn < last)", *(f"n{i} = h{i}" for i in w.S), "if HAS_RESET:")
    reset(w, indent + 1, "rn", "tn", "ahead")
    w.put(indent + 1, *(f"n{i} = tl.where(rn, 0.0, n{i})" for i in w.S))
    inputs(w, indent, "tn", "ahead[:, None] & inside", [i for i in w.X if f"x{i}" in needed])
    _operands(w, indent, 0, parity, "n", [])


def _phase(w: Writer, indent: int, level: int) -> None:
    dense, S, last = w.dense, len(w.S), level == len(w.dense.levels) - 1
    if level == 0:
        w.put(indent, "if FIRST:")
        for i in w.S:
            w.keep(indent + 1, "BEGINS", "place", i, S, f"h{i}", "all_ & (it == 0)")
        w.put(indent + 1, *(f"P{i}{j} = tl.where(it == 0, {float(i == j)}, P{i}{j})" for i, j in w.tracked))
        w.put(indent, "if HAS_RESET:")
        reset(w, indent + 1, "r", "t", "live")
        w.put(indent + 1, *(f"h{i} = tl.where(r, 0.0, h{i})" for i in w.S), *(f"P{i}{j} = tl.where(r, 0.0, P{i}{j})" for i, j in w.tracked))
    inputs(w, indent, "t", "both", list(w.X))
    _multiply(w, indent, level)
    known = [i for earlier in range(level) for i in dense.of_level(earlier)]
    between(w, indent, "EARLIER", [f"p{i}" for i in known], len(w.Q), load=True)
    if not last:
        mine = dense.of_level(level)
        between(w, indent, "EARLIER", [f"p{i}" for i in mine], len(w.Q), load=False)
        _operands(w, indent, level + 1, "parity", "h", [*known, *mine])
        return
    if level:
        w.put(indent, "if HAS_RESET:")
        reset(w, indent + 1, "r", "t", "live")
    entries = [f"j{i}{j}" for i, j in w.tracked]
    w.put(indent, f"{', '.join([*(f'y{i}' for i in w.S), *entries])} = new_and_jacobian({w.given()})")
    w.put(indent, *(f"h{i} = tl.where(go, y{i}, h{i})" for i in w.S))
    products_of_jacobians(w, indent, back=False)
    near(w, indent, "h", back=False)
    w.put(indent, f"tl.store(EMITTED + at[:, None] * D + d, h{S - 1}.to(EMITTED.dtype.element_ty), mask=kept)")
    w.put(indent, *(f"tl.store(KEPT + (at * {S - 1} + {i})[:, None] * D + d, h{i}, mask=kept)" for i in range(S - 1)))
    _next_operands(w, indent, "it + 1", "1 - parity")
