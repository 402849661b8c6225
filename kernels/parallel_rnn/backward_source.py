"""Emits the backward kernels of a cell: gradient, mend_gradient, transfer (what they are for: kernels/parallel_rnn/codegen.py)."""

from __future__ import annotations

from kernels.parallel_rnn.trace import Traced
from kernels.parallel_rnn.writer import SIZES, STAGES, Writer, live

TENSORS = "PRE, REC, H0, RESET, EMITTED, KEPT, D_EMITTED, D_KEPT"


def _loads(w: Writer) -> None:
    """The group at t: inputs, states before each step, incoming gradients. Only the very first state lies before the tensor: h0."""
    w.load_tiles(2, "t")
    w.put(2, "before = tl.where(t + each == 0, 0, each - 1)")
    for i in w.S:
        kept = i != w.n_kept
        w.tile(2, f"a{i}", w.state(i, 0), f"before * {w.n_kept} * D" if kept else "before * D")
        if kept:
            w.put(2, "if WITH_KEPT:")
        w.tile(2 + kept, f"e{i}", w.state(i, 0, "d_"), f"each * {w.n_kept} * D" if kept else "each * D")


def _enter(w: Writer) -> None:
    """Pointers at the last group of the slice."""
    w.put(1, f"top = first + ((last - first - 1) // {w.U}) * {w.U}")
    w.put(1, "p = PRE + b * sb + top.to(tl.int64) * ST + _columns(tile, se, D, HEAD, BD)", "q = RESET + b * T + top")
    w.state_pointers(1, "top")
    w.state_pointers(1, "top", "D_EMITTED", "D_KEPT", "d_")
    w.put(1, "dp = D_PRE + b * d_sb + top.to(tl.int64) * D_ST + _columns(tile, d_se, D, HEAD, BD)")
    w.load_resets(1, "", "top")


def _loop(w: Writer, steps: str) -> None:
    """Groups downwards from the top, `steps` steps in all, with their loads; pointers move to the group before."""
    w.put(1, f"for done in tl.range(0, {steps}, {w.U}, num_stages={STAGES}):", "    t = top - done")
    _loads(w)
    w.put(2, f"p -= {w.U} * ST")
    w.move(2, f"-{w.U}")
    w.move(2, f"-{w.U}", "d_")
    w.put(2, f"ahead = tl.where(t - {w.U} >= first, {w.U}, 0)  # the last group's resets are loaded twice", "q -= ahead")
    w.load_resets(2, "n", "(t - ahead)")


def _before(w: Writer, u: int) -> None:
    """a: the states step u starts from; z: the whole gradient of the states after it."""
    w.put(2, f"go = t + {u} < last")
    w.put(2, *(f"a{i} = a{i}_{u}.to(tl.float32)" for i in w.S))
    if u == 0:
        w.put(2, *(f"a{i} = tl.where(t == 0, first{i}, a{i})" for i in w.S))
    w.put(2, "if HAS_RESET:", *(f"    a{i} = tl.where(r{u} != 0, 0.0, a{i})" for i in w.S))
    w.put(2, f"z{w.n_kept} = e{w.n_kept}_{u}.to(tl.float32) + g{w.n_kept}", *(f"z{i} = g{i}" for i in range(w.n_kept)))
    if w.n_kept:
        w.put(2, "if WITH_KEPT:", *(f"    z{i} += e{i}_{u}.to(tl.float32)" for i in range(w.n_kept)))


def _gradients(w: Writer, u: int, names: tuple[str, str, str], cotangent: str) -> None:
    states = w.each("a{i}", w.S)
    out = [*(f"{names[0]}{k}" for k in w.P), *(f"{names[1]}{r}" for r in w.R), *(f"{names[2]}{i}" for i in w.S)]
    w.put(2, f"{', '.join(out)} = {w.call('step_vjp', u, states, w.each(cotangent, w.S))}")


def _reset_and_keep(w: Writer, u: int, new: str, old: str) -> None:
    """The adjoint that leaves step u: nothing passes a reset, and steps after the end change nothing."""
    w.put(2, "if HAS_RESET:", *(f"    {new}{i} = tl.where(r{u} != 0, 0.0, {new}{i})" for i in w.S))
    w.put(2, *(f"{old}{i} = _keep(go, {new}{i}, {old}{i}, EVEN)" for i in w.S))


def _store_gradients(w: Writer, u: int) -> None:
    w.put(2, *(f"_put(dp + ({u} * D_ST + {k} * D_SP), y{k}, {live('go')}, EVEN)" for k in w.P))


SCALE = 40  # products of Jacobians start from 2^SCALE, so that one which dies may come back from as little as an adjoint itself could
# The smaller one of the two is not made smaller still, so that digits are lost only where the result has none.
PASSED = f"""
@triton.jit
def _passed(J, f):  # what a product from 2^{SCALE} leaves of an adjoint
    large = tl.abs(J) > 1.0
    return _times(tl.where(large, J * {2.0**-SCALE!r}, J), f * tl.where(large, 1.0, {2.0**-SCALE!r}))
"""


def _head(w: Writer, name: str, own: str, after: bool = False) -> None:
    n = len(w.S)
    extra = (
        "D_PRE, D_REC, D_H0, D_FINAL, ENDS, PRODUCTS, WINDOWS, FLAGS, WINDOW, TOLERANCE, d_sb, d_se, D_ST: tl.constexpr, D_SP: tl.constexpr"
    )
    w.begin(name, f"{TENSORS}, {extra}, {own}WITH_KEPT: tl.constexpr,\n        {SIZES}", after=after)
    w.put(
        1,
        f"o = (b * n + s) * {n} * D + d",
        f"oo = (b * n + s) * {n * n} * D + d",
        f"o0 = b * {n} * D + d",
        "flags = FLAGS + tl.program_id(0) * n",
    )


def _open(w: Writer, last: str) -> None:
    w.weights()
    w.put(1, "first = s * SLICE", f"last = {last}")
    w.put(1, *(f"first{i} = {w.vector('H0', 'o0', i)}" for i in w.S), *(f"dw{r} = tl.zeros((BD,), tl.float32)" for r in w.R))


def _window(w: Writer, k: str) -> str:
    """Offset of the window k of slice s: products and U at its first step, which are those that the window before it is entered with."""
    n = len(w.S)
    return f"((b * n + s) * ((SLICE + WINDOW - 1) // WINDOW) + {k}) * {n * n + n} * D + d"


def gradient(traced: Traced, unroll: int) -> str:
    """WINDOWS: every WINDOW steps of a slice, the products of the Jacobians from the slice's end, which say how much of an adjoint from later
    slices gets there, and U, what a change of some adjoint of the slice by its own size would be there: the largest of |product| times
    |adjoint| over the steps walked so far, as V is of states. FLAGS: whether a product is of no use, as it is not finite."""
    w, n = Writer(traced, unroll), len(traced.cell.state)
    _head(w, "gradient", "SLICED: tl.constexpr, ")
    _open(w, "tl.minimum(first + SLICE, T)")
    last_slice = live("s == n - 1")
    w.put(1, *(f"g{i} = {w.vector('D_FINAL', 'o0', i, last_slice)}  # later slices bring theirs in mend_gradient" for i in w.S))
    w.put(1, *(f"J{i}{j} = tl.full((BD,), {2.0**SCALE * (i == j)}, tl.float32)" for i in w.S for j in w.S))
    w.put(1, *(f"U{i} = tl.zeros((BD,), tl.float32)" for i in w.S))
    _enter(w)
    _loop(w, "last - first")
    for u in reversed(range(unroll)):
        _before(w, u)
        _gradients(w, u, ("y", "c", "k"), "z{i}")
        _store_gradients(w, u)
        w.put(2, *(f"dw{r} += _keep(go, c{r}, 0.0, EVEN)" for r in w.R))
        w.put(2, "if SLICED:", *(f"    U{i} = _most(U{i}, tl.abs(z{i}))" for i in w.S))
        w.put(3, f"{', '.join(w.matrix('j{i}{j}'))} = {w.call('jacobian', u, w.each('a{i}', w.S))}")
        w.put(3, *(f"m{i}{j} = {w.product(f'j{{m}}{i}', 'J{m}{j}', i, j)}" for i in w.S for j in w.S))
        w.put(3, "if HAS_RESET:", *(f"    {line}" for line in w.matrix(f"m{{i}}{{j}} = tl.where(r{u} != 0, 0.0, m{{i}}{{j}})")))
        w.put(3, *w.matrix("J{i}{j} = _keep(go, m{i}{j}, J{i}{j}, EVEN)"))
        for i in w.S:  # the last slice, which may end early, has no use for it
            most = f"tl.abs(j0{i}) * U0"
            for m in w.S[1:]:
                most = f"_most({most}, tl.abs(j{m}{i}) * U{m})"
            w.put(3, f"most{i} = {most}")
        w.put(3, *(f"U{i} = most{i}" for i in w.S))
        w.put(3, "if HAS_RESET:", *(f"    U{i} = tl.where(r{u} != 0, 0.0, U{i})" for i in w.S))
        _reset_and_keep(w, u, "k", "g")
    w.put(2, "if SLICED:", "    if (t - first) % WINDOW == 0:")
    w.put(4, f"window = WINDOWS + {_window(w, '(t - first) // WINDOW')}")
    w.put(4, *w.matrix(f"tl.store(window + ({{i}} * {n} + {{j}}) * D, J{{i}}{{j}}, mask=inside)"))
    w.put(4, *(f"tl.store(window + {n * n + i} * D, U{i}, mask=inside)" for i in w.S))
    w.put(2, f"dp -= {unroll} * D_ST")
    w.next_resets(2)
    w.put(1, *(f"tl.store(D_REC + ((b * n + s) * {len(w.R)} + {r}) * D + d, dw{r}, mask=inside)" for r in w.R))
    w.put(1, "if s == 0:", *(f"    tl.store(D_H0 + o0 + {i} * D, g{i}, mask=inside)" for i in w.S))
    w.put(1, "if SLICED:", *(f"    tl.store(ENDS + o + {i} * D, g{i}, mask=inside)" for i in w.S))
    w.put(2, *w.matrix(f"tl.store(PRODUCTS + oo + ({{i}} * {n} + {{j}}) * D, J{{i}}{{j}}, mask=inside)"))
    w.put(
        2,
        "fine = " + " & ".join(w.matrix("(tl.abs(J{i}{j}) <= 3.0e38)")),
        "tl.store(flags + s, tl.max(tl.where(inside & (fine == 0), 1, 0), 0))",
    )
    return w.text()


def mend_gradient(traced: Traced, unroll: int) -> str:
    """Adjoints are linear: with the true adjoint at a slice's end, f more than `gradient` had, what it wrote is right again below the last
    window in which f counts, and the weights' gradients lack those of f. In a tile with a product of no use (`bad`) the program of the first
    slice walks all steps in order, from the last to the first, as if they were one slice."""
    w, n = Writer(traced, unroll), len(traced.cell.state)
    _head(w, "mend_gradient", "STATS, MOST_SLICES: tl.constexpr, ", after=True)
    _load_windows(w)
    w.put(1, "k = tl.arange(0, MOST_SLICES)", "bad = tl.max(tl.load(flags + k, mask=k < n, other=0), 0)")
    w.put(1, "if s == 0:", "    tl.atomic_add(STATS + 4, 1.0)", "    tl.atomic_add(STATS + 5, bad.to(tl.float32))")
    slot = [f"dw = D_REC + ((b * n + s) * {len(w.R)} + {r}) * D + d" for r in w.R]
    w.put(
        1,
        "if (bad != 0) & (s != 0):",
        *(f"    {line}\n        tl.store(dw, tl.zeros((BD,), tl.float32), mask=inside)" for line in slot),
        "    return",
    )
    w.put(1, "if (bad == 0) & (s == n - 1):", "    return")
    _handed_down(w)
    w.put(
        1,
        "some = " + " | ".join(f"(f{i} != 0.0)" for i in w.S),
        "if (bad == 0) & (tl.max(tl.where(inside & some, 1, 0), 0) == 0):",
        "    return",
    )
    w.put(1, "if (bad == 0) & (s == 0):")
    entry = f"tl.load(PRODUCTS + oo + ({{i}} * {n} + {{j}}) * D, mask=inside, other=0.0)"
    w.put(
        2,
        *(f"k{i} = {w.vector('D_H0', 'o0', i)} + " + " + ".join(f"_passed({entry.format(i=i, j=j)}, f{j})" for j in w.S) for i in w.S),
    )
    w.put(2, *(f"tl.store(D_H0 + o0 + {i} * D, k{i}, mask=inside)" for i in w.S))
    _lowest_window(w)
    _open(w, "tl.where(bad != 0, T, tl.minimum(first + SLICE, T))")
    _enter(w)
    w.put(1, *(f"g{i} = tl.where(bad != 0, {w.vector('D_FINAL', 'o0', i)}, f{i})" for i in w.S))
    _loop(w, f"top - first - tl.where(bad != 0, 0, lowest) * WINDOW + {unroll}")
    for u in reversed(range(unroll)):
        _before(w, u)
        _gradients(w, u, ("y", "_c", "k"), "z{i}")
        w.put(2, *(f"f{i} = tl.where(bad != 0, z{i}, f{i})" for i in w.S))
        _gradients(w, u, ("_y", "c", "m"), "f{i}")
        _store_gradients(w, u)
        w.put(2, *(f"dw{r} += _keep(go, c{r}, 0.0, EVEN)" for r in w.R))
        _reset_and_keep(w, u, "k", "g")
        _reset_and_keep(w, u, "m", "f")
    w.put(2, f"dp -= {unroll} * D_ST")
    w.next_resets(2)
    for r in w.R:
        w.put(1, slot[r], f"tl.store(dw, tl.where(bad != 0, 0.0, tl.load(dw, mask=inside, other=0.0)) + dw{r}, mask=inside)")
    w.put(1, "if bad != 0:", *(f"    tl.store(D_H0 + o0 + {i} * D, g{i}, mask=inside)" for i in w.S))
    return w.text()


def _handed_down(w: Writer) -> None:
    """f: the adjoint at the slice's end from all slices after it."""
    n = len(w.S)
    w.put(
        1,
        f"oe = (b * n + n - 1) * {n} * D + d",
        f"op = (b * n + n - 1) * {n * n} * D + d",
        *(f"f{i} = {w.vector('ENDS', 'oe', i)}" for i in w.S),
    )
    group = range(1, 1 + max(1, 24 // (n * (n + 1))))
    w.put(1, f"for k in range(0, n - 2 - s, {len(group)}):")
    for u in group:
        here = live(f"k + {u} <= n - 2 - s")
        w.put(2, *(f"e{i}_{u} = {w.vector('ENDS', 'oe', i - u * n, here)}" for i in w.S))
        w.put(2, *w.matrix(f"j{{i}}{{j}}_{u} = tl.load(PRODUCTS + op + ({{i}} * {n} + {{j}} - {u * n * n}) * D, mask={here}, other=0.0)"))
    for u in group:
        w.put(2, *(f"m{i} = e{i}_{u} + " + " + ".join(f"_passed(j{i}{j}_{u}, f{j})" for j in w.S) for i in w.S))
        w.put(2, *(f"f{i} = tl.where(k + {u} <= n - 2 - s, m{i}, f{i})" for i in w.S))
    w.put(2, f"oe -= {len(group) * n} * D", f"op -= {len(group) * n * n} * D")


def windows(n: int) -> int:
    """The most windows of a slice of a cell with n states, as many as are loaded at once."""
    return max(2, min(16, 48 // (n * n + n)))


def _load_windows(w: Writer) -> None:
    """w and v: product and U that each window is entered with, but the highest one. Early, beside what f waits for."""
    n = len(w.S)
    w.put(1, "windows = (SLICE + WINDOW - 1) // WINDOW", f"window = WINDOWS + {_window(w, '0')}")
    for u in range(windows(n) - 1):
        here, at = live(f"{u + 1} < windows"), (u + 1) * (n * n + n)
        w.put(1, *w.matrix(f"w{{i}}{{j}}_{u} = tl.load(window + ({at} + {{i}} * {n} + {{j}}) * D, mask={here}, other=0.0)"))
        w.put(1, *(f"v{i}_{u} = tl.load(window + {at + n * n + i} * D, mask={here}, other=0.0)" for i in w.S))


def _lowest_window(w: Writer) -> None:
    """lowest: the first window that f enters with more than TOLERANCE of U, or beside a U that is not finite, and which is not the highest one.
    Of a cell of one state U falls no faster than f on the way down: what is little where a window is entered is little below."""
    w.put(1, "low = tl.zeros((BD,), tl.int32) + windows - 1  # of each channel")
    for u in range(windows(len(w.S)) - 1):
        fits = []
        for i in w.S:
            w.put(1, f"rest{i} = " + " + ".join(f"tl.abs(_passed(w{i}{j}_{u}, f{j}))" for j in w.S))
            fits.append(f"((rest{i} == 0.0) | ((rest{i} <= TOLERANCE * v{i}_{u}) & (v{i}_{u} <= 3.0e38)))")
        w.put(1, f"low = tl.where(inside & (({' & '.join(fits)}) == 0), tl.minimum(low, {u}), low)")
    w.put(1, "lowest = tl.min(low, 0)")


def transfer(traced: Traced, unroll: int) -> str:
    """Products M of the Jacobians of each slice at known states, V at its end, and what the gradients d of its states come to at its start: the
    sum of M^T d as the product grows, so that one walk forwards gives all."""
    w, n = Writer(traced, unroll), len(traced.cell.state)
    w.begin("transfer", f"{TENSORS}, PRODUCTS, ENDS, LEFT,\n        WITH_STATES: tl.constexpr, WITH_KEPT: tl.constexpr, {SIZES}")
    w.weights()
    w.put(
        1, "first = s * SLICE", "last = tl.minimum(first + SLICE, T)", *(f"first{i} = {w.vector('H0', f'b * {n} * D + d', i)}" for i in w.S)
    )
    w.put(1, *(f"J{i}{j} = tl.full((BD,), {float(i == j)}, tl.float32)" for i in w.S for j in w.S))
    w.put(1, *(f"V{i} = tl.zeros((BD,), tl.float32)" for i in w.S))
    w.put(1, "p = PRE + b * sb + first.to(tl.int64) * ST + _columns(tile, se, D, HEAD, BD)", "q = RESET + b * T + first")
    w.put(1, *(f"g{i} = tl.zeros((BD,), tl.float32)" for i in w.S))
    w.state_pointers(1, "first")
    w.state_pointers(1, "first", "D_EMITTED", "D_KEPT", "d_")
    w.put(1, f"for t in tl.range(first, last, {unroll}, num_stages={STAGES}):", "    back = tl.where(t == 0, 0, 1)")
    w.load_inputs(2, "t")
    w.load_resets(2, "", "t")
    for u in range(unroll):
        w.put(2, f"go = t + {u} < last")
        for i in w.S:
            before = w.state(i, u - 1) if u else w.state(i, 0) + f" - back * {'D' if i == w.n_kept else f'{w.n_kept} * D'}"
            w.put(2, f"a{i} = _get({before}, {live('go')}, EVEN).to(tl.float32)")
        if u == 0:
            w.put(2, *(f"a{i} = tl.where(t == 0, first{i}, a{i})" for i in w.S))
        w.put(2, "if HAS_RESET:", *(f"    a{i} = tl.where(r{u} != 0, 0.0, a{i})" for i in w.S))
        w.put(2, f"{', '.join(w.matrix('j{i}{j}'))} = {w.call('jacobian', u, w.each('a{i}', w.S))}")
        w.put(2, *(f"m{i}{j} = {w.product('j{i}{m}', 'J{m}{j}', i, j)}" for i in w.S for j in w.S))
        w.put(2, "if HAS_RESET:", *(f"    {line}" for line in w.matrix(f"m{{i}}{{j}} = tl.where(r{u} != 0, 0.0, m{{i}}{{j}})")))
        w.put(
            2,
            *w.matrix("J{i}{j} = _keep(go, m{i}{j}, J{i}{j}, EVEN)"),
            *(f"V{i} = _most(V{i}, tl.abs(a{i}))" for i in w.S),
            *(f"k{i} = V{i}" for i in w.S),
        )
        w.put(2, *w.left("k", "j{i}{j}", "k{j}", "0.0 * k{i}"), *(f"V{i} = _keep(go, k{i}, V{i}, EVEN)" for i in w.S))
        w.put(2, "if HAS_RESET:", *(f"    V{i} = tl.where(r{u} != 0, 0.0, V{i})" for i in w.S))
        w.put(2, "if WITH_STATES:", f"    e = _get({w.state(w.n_kept, u, 'd_')}, {live('go')}, EVEN).to(tl.float32)")
        w.put(3, *(f"g{j} += J{w.n_kept}{j} * e" for j in w.S))
        w.put(2, "if WITH_KEPT:" if w.n_kept else "")
        for i in range(w.n_kept):
            w.put(3, f"e = _get({w.state(i, u, 'd_')}, {live('go')}, EVEN).to(tl.float32)", *(f"g{j} += J{i}{j} * e" for j in w.S))
    w.put(2, f"p += {unroll} * ST", f"q += {unroll}")
    w.move(2, str(unroll))
    w.move(2, str(unroll), "d_")
    w.put(1, "if WITH_STATES:", *(f"    tl.store(ENDS + (b * n + s) * {n} * D + {i} * D + d, g{i}, mask=inside)" for i in w.S))
    w.put(1, *(f"tl.store(LEFT + ((b * n + s) * {n} + {i}) * D + d, V{i}, mask=inside)" for i in w.S))
    w.put(
        1,
        f"oo = (b * n + s) * {n * n} * D + d",
        *w.matrix(f"tl.store(PRODUCTS + oo + ({{i}} * {n} + {{j}}) * D, J{{i}}{{j}}, mask=inside)"),
    )
    return w.text()
