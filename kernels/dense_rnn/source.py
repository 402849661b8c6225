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

from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.products import Dense, apart

SIZES = "T, SLICE, n, B, sb, st, sp, se, K: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, NEAR: tl.constexpr"
WIDTHS = "HAS_RESET: tl.constexpr, HALVES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr"
# sizes that plans change: another plan is no reason to compile again; but one slice is, where a step is a tenth to a third quicker
JIT = '@triton.jit(do_not_specialize_on_alignment=["T", "SLICE", "n", "B", "BURN", "N", "PIECE"])'
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

PUT = {  # a store that lies as its value does; the compiler brings what tl.store takes into the order of memory
    "ptx": """
@triton.jit
def _put(p, x, mask):
    tl.inline_asm_elementwise(
        "{.reg .pred q; setp.ne.s32 q, $3, 0; @q st.global.f32 [$1], $2; mov.u32 $0, 0;}",
        "=r,l,f,r", [p.to(tl.int64), x, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )
""",
    "portable": """
@triton.jit
def _put(p, x, mask):
    tl.store(p, x, mask=mask)
""",
}


class Writer:
    """Lines of kernels with indentation, and what the kernels of a cell share. across: the axis of channels."""

    across = 1
    room = ""  # which matrices are held backwards, where there are more than two states

    def __init__(self, dense: Dense) -> None:
        cell = dense.cell
        self.dense, self.lines = dense, list[str]()
        self.begins = {i: start for i, (start, _) in dense.begun.items()}
        self.known = len(apart(dense).known)
        self.X, self.W, self.S, self.G = (range(len(a)) for a in (cell.pre, cell.rec, cell.state, cell.mat))
        self.Q = range(len(dense.products))
        carried = set(dense.carried)
        # weights whose gradient is a sum of a product's cotangents, as biases': one more row of the matrices' gradient, of an operand of ones
        found = {r: next((i for i in self.Q if dense.d_rec[r] is dense.d_product[i]), None) for r in self.W}
        self.as_ones = {r: i for r, i in found.items() if i is not None}
        self.summed = [r for r in self.W if r not in self.as_ones]
        # of each product the input whose gradient its cotangent is, where all have one: it need not be stored twice
        same = [next((x for x in self.X if dense.d_pre[x] is dense.d_product[i]), None) for i in self.Q]
        self.as_inputs = [x for x in same if x is not None] if None not in same else []
        self.tracked = sorted(carried | {(m, m) for i, j in carried for m in (i, j)})  # with what a product begins from

    def put(self, indent: int, *lines: str) -> None:
        self.lines += ["    " * indent + line for line in lines if line]

    def given(self, prefix: str = "", products: bool = True) -> str:
        """The arguments of the step's functions, in the dtype of the arithmetic."""
        values = [f"{prefix}x{i}" for i in self.X] + [f"w{i}" for i in self.W] + [f"{prefix}h{i}" for i in self.S]
        return ", ".join(values + [f"{prefix}p{i}" for i in self.Q])

    def known_before(self) -> str:
        """What the adjoint's functions take besides cotangents: values of a step that are known before these, and weights."""
        return ", ".join([f"y{i}" for i in range(self.known)] + [f"w{i}" for i in self.W])

    def head(self, name: str, arguments: str) -> None:
        self.put(0, "", "", JIT, f"def {name}({arguments}, {SIZES},", f"        {WIDTHS}):")
        self.wait()
        self.put(
            1,
            "e, E = tl.program_id(1), tl.num_programs(1)",
            "k = tl.arange(0, BK)",
            "inside = (k < K)[None, :]",
            "d = (e * K + k)[None, :]",
        )
        self.put(1, "rows = tl.program_id(0) * BM + tl.arange(0, BM)")

    def wait(self, short: bool = False) -> None:
        """DEPENDENT: the kernel may be launched before the one has ended whose results it reads, and waits for it here. short: what comes after it may
        be launched now; behind a walk that would fill the multiprocessors unevenly, as its programs end."""
        self.put(1, "if DEPENDENT:", "    tl.extra.cuda.gdc_launch_dependents()" if short else "", "    tl.extra.cuda.gdc_wait()")

    def matrices(self, source: str, held: str = "R") -> None:
        """Loads the matrices of a head. held: those of 64 channels in 16 bits stay in registers ("R"), or where they are multiplied transposed ("RT"). The
        compiler (Triton 3.6) reads a matrix from shared memory in each step otherwise, between the barrier and the product: it moves there what brings a
        load into the order of products, but not the parts that a larger one is split into."""
        G = len(self.G)
        loads = [f"R{g} = tl.load(R_ + tl.expand_dims(k, 1) * ({G} * BK) + {g} * BK + tl.expand_dims(k, 0))" for g in self.G]
        self.put(1, f"R_ = {source} + e.to(tl.int64) * (BK * {G} * BK)")
        self.transposed = "RT" if held == "RT" and G <= 4 else "R"
        if self.transposed == "RT":
            self.put(1, *loads)
            loads = [f"RT{g} = R{g}" for g in self.G]
        if held and G <= 4:
            names = ", ".join(f"{held}{g}" if g in self.G else "_" for g in range(4))
            self.put(1, "if BK <= 64 and DOT.primitive_bitwidth == 16:", f"    {names} = _held(R_, BK, {G})", "else:")
            loads = [f"    {load}" for load in loads]
        self.put(1, *loads)
        for r in self.W:
            self.put(1, f"w{r} = tl.load(REC + {r} * D + d, mask=inside, other=0.0)")

    def dot(self, value: str, g: int, back: bool = False, start: str = "") -> str:
        return (
            f"tl.dot({value}, {f'tl.trans({self.transposed}{g})' if back else f'R{g}'}{start and f', {start}'}, input_precision=PRECISION)"
        )

    def dots(self, indent: int, meanwhile: Callable[[], None] | None = None) -> None:
        """All products of the states h, those that may from the inputs and weights that they are added to. meanwhile: writes what may be done while the first ones are made."""
        for l, level in enumerate(self.dense.levels):
            known = [i for earlier in range(l) for i in self.dense.of_level(earlier)]
            arguments = [f"x{i}" for i in self.X] + [f"w{i}" for i in self.W] + [f"h{i}" for i in self.S]
            arguments += [f"p{i}" if i in known else "h0" for i in self.Q]
            self.put(indent, f"{', '.join(f'u{i}' for i in level)} = operands{l}({', '.join(arguments)})")
            self.put(indent, *(f"v{i}, u{i} = u{i}, u{i}.to(DOT)" for i in level))
            if meanwhile is not None and l == 0:
                meanwhile()
            for i in self.dense.of_level(l):
                matrix, operand = self.dense.products[i]
                self.put(indent, f"p{i} = {self.dot(f'u{operand}', matrix, start=self.begins.get(i, ''))}")
            self.put(indent, "if HALVES:", *(f"    v{i} = (v{i} - u{i}.to(tl.float32)).to(DOT)" for i in level))
            for i in self.dense.of_level(l):
                matrix, operand = self.dense.products[i]
                self.put(indent + 1, f"p{i} += {self.dot(f'v{operand}', matrix)}")

    def load(self, places: str) -> str:
        """What a step reads, in fp32."""
        return f"tl.load({places}, mask=both, other=0.0).to(tl.float32)"

    def store_all(self, indent: int, to: str, stride: str, values: list[str], mask: str = "both") -> None:
        """Stores values that lie `stride` apart. Two or four of them at once: on its way from a product's layout to that of memory each would wait at
        two barriers."""
        if len(values) not in (2, 4):
            self.put(indent, *(f"tl.store({to} + {i} * {stride}, {value}, mask={mask})" for i, value in enumerate(values)))
            return
        pairs = [f"tl.join({a}, {b})" for a, b in zip(values[::2], values[1::2])]
        steps, more = (
            ("tl.arange(0, 2)", "None") if len(pairs) == 1 else ("(tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :])", "None, None")
        )
        at = "None, None, :" if len(pairs) == 1 else "None, None, :, :"
        self.put(indent, f"all_ = {pairs[0] if len(pairs) == 1 else f'tl.join({pairs[0]}, {pairs[1]})'}", f"places_ = ({to})[:, :, {more}]")
        self.put(indent, f"tl.store(places_ + ({steps} * {stride})[{at}], all_, mask={mask}[:, :, {more}])")

    def keep_all(self, indent: int, to: str, stride: str, values: list[str], mask: str) -> None:
        """As `store_all`, states in fp32."""
        self.store_all(indent, to, stride, values, mask)

    def vector(self, source: str, where: str, i: int, of: int, mask: str = "both") -> str:
        """Entry i of a small array (.., of, D) at row `where`."""
        return f"tl.load({source} + (({where}) * {of} + {i})[:, None] * D + d, mask={mask}, other=0.0)"

    def keep(self, indent: int, target: str, where: str, i: int, of: int, value: str, mask: str = "both") -> None:
        self.put(indent, f"tl.store({target} + (({where}) * {of} + {i})[:, None] * D + d, {value}, mask={mask})")


class Narrow(Writer):
    """Writes the same with both axes of all values changed, (BK, BM): products have the matrices on their left, where a tile of them is 16 wide, and rows
    on the other side, where it is eight. So a program may walk eight rows with four warps, and two of them on a multiprocessor hide each other's waiting;
    in late rounds, when few heads are left, each has a multiprocessor for itself and is done sooner."""

    across = 0
    room = "RT"

    def put(self, indent: int, *lines: str) -> None:
        super().put(indent, *(_turned(line) for line in lines))

    def dot(self, value: str, g: int, back: bool = False, start: str = "") -> str:
        return (
            f"tl.dot({f'{self.transposed}{g}' if back else f'tl.trans(R{g})'}, {value}{start and f', {start}'}, input_precision=PRECISION)"
        )

    def load(self, places: str) -> str:
        """As a load of three axes: one of two that is brought straight into the order of products the compiler (Triton 3.6) keeps in registers for as many
        steps as it is ahead, where it has this one copied to shared memory."""
        return f"tl.reshape(tl.load(({places})[:, :, None], mask=both[:, :, None], other=0.0), (BM, BK)).to(tl.float32)"

    def store_all(self, indent: int, to: str, stride: str, values: list[str], mask: str = "both") -> None:
        """As one axis more, which the compiler brings into the order of memory as a whole."""
        if len(values) not in (2, 3, 4):
            return super().store_all(indent, to, stride, values, mask)
        mask = f"{mask}[:, :, None]"
        if len(values) == 3:
            values, mask = [*values, values[2]], f"{mask} & (tl.arange(0, 4) < 3)"
        pairs = [f"tl.join({a}, {b})" for a, b in zip(values, values[len(values) // 2 :])]
        all_ = pairs[0] if len(pairs) == 1 else f"tl.reshape(tl.join({', '.join(pairs)}), (BM, BK, 4))"
        self.put(indent, f"all_ = {all_}", f"places_ = ({to})[:, :, None] + tl.arange(0, {len(values)}) * {stride}")
        self.put(indent, f"tl.store(places_, all_, mask={mask})")

    def keep_all(self, indent: int, to: str, stride: str, values: list[str], mask: str) -> None:
        """From the order in which products lie, where eight channels of a row are neighbours, a sector of memory: without a way through shared memory, which
        ends at a barrier before the step's product."""
        self.put(indent, *(f"_put({to} + {i} * {stride}, {value}, {mask})" for i, value in enumerate(values)))


def _turned(line: str) -> str:
    """A line of kernels with the axes of rows and channels changed; of what has one axis, or more than two, nothing is."""
    line = line.replace("[:, None]", "[@]").replace("[None, :]", "[:, None]").replace("[@]", "[None, :]")
    return re.sub(r"\(BM, BK\b", "(BK, BM", line)


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
    w.keep_all(indent, f"KEPT + {at}[:, None] * ({n_kept} * D) + d", "D", [f"{states}{i}" for i in range(n_kept)], mask)


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
