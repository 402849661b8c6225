"""What the emitters of the kernels share: names, address arithmetic, loads of groups of steps.

Names in the generated source: x{k}_{u} input projection k of step u of the group, w{r} weights, h{i} states, a{i} the states before a step,
e{i} their incoming gradients, g{i} adjoints, J{i}{j} products of Jacobians, P{i}{j} those of a group of steps. V{i}: what a change of some
earlier state of the slice by its own size would still be here: the largest of product times state. G{i}{j}: the largest product from the end of
any group to that of a later one, R{i}{j} from any to here; C{i}{j}{k}: second derivatives of the state by those the slice began with; L{i}: the largest state of the slice's last eighth (`Writer.end_group`).

Loads run ahead of the arithmetic, or each step would wait for memory: loops are pipelined by Triton, which copies asynchronously to shared
memory, STAGES groups of steps deep. (Loads into registers a group ahead do not do it, the compiler moves them down again.) `mend`, which ends
early, does it a stretch of steps at a time. Resets are a byte a step for all channels, and are loaded one group ahead (names that begin with n).
"""

from __future__ import annotations

from collections.abc import Sequence

from kernels.parallel_rnn.trace import Traced

HELPERS = '''
@triton.jit
def _get(p, live, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=live, other=0.0)


@triton.jit
def _put(p, x, live, EVEN: tl.constexpr):
    if EVEN:
        tl.store(p, x)
    else:
        tl.store(p, x, mask=live)


@triton.jit
def _keep(go, new, old, EVEN: tl.constexpr):  # steps after the end leave a value as it is
    if EVEN:
        return new
    else:
        return tl.where(go, new, old)


@triton.jit
def _most(x, y):  # the larger one; not a number if one of them is not
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _share(change, size):  # no change is no share of anything, and what is not finite is too much
    share = tl.abs(change) / size
    return tl.where(change == 0.0, 0.0, tl.where((share <= 3.0e38) & (size <= 1.0e37), share, 3.0e38))


@triton.jit
def _next_span(span, was, now, TOLERANCE, MARK: tl.constexpr):
    """Steps until a distance that fell from `was` to `now` within `span` steps is within the tolerance, should it go on so."""
    fell, left = tl.log2(was / tl.maximum(now, 1.0e-30)), tl.log2(tl.maximum(now / TOLERANCE, 1.0))
    steps = tl.minimum(span * left / tl.maximum(fell, 0.01), 1.0e6)
    return ((steps / MARK).to(tl.int32) + 1) * MARK


@triton.jit
def _times(J, x):  # nothing stays nothing, whatever it is multiplied with; nothing passes where a document starts
    return tl.where((x == 0.0) | (J == 0.0), 0.0, J * x)


@triton.jit
def _columns(tile, se, D: tl.constexpr, HEAD: tl.constexpr, BD: tl.constexpr):  # offsets of a tile's channels, which lie in heads of HEAD
    if HEAD == D:
        return tile * BD + tl.arange(0, BD)
    elif HEAD % BD == 0:  # the remainder is a multiple of BD: some releases of Triton do not see it, and copy nothing asynchronously
        return (tile * BD // HEAD).to(tl.int64) * se + (tl.multiple_of(tile * BD % HEAD, BD) + tl.arange(0, BD))
    else:
        d = tile * BD + tl.arange(0, BD)
        return (d // HEAD).to(tl.int64) * se + d % HEAD
'''
STAGES = 4  # groups of steps in flight in the loops that copy to shared memory
SIZES = "T, SLICE, sb, se, D: tl.constexpr, HEAD: tl.constexpr, ST: tl.constexpr, SP: tl.constexpr, MARK: tl.constexpr,\n"
SIZES += "        HAS_RESET: tl.constexpr, EVEN: tl.constexpr, BD: tl.constexpr"


def live(condition: str) -> str:
    """The mask of a tile's channels under a scalar condition (written so that Triton's interpreter takes it too)."""
    return f"d < tl.where({condition}, D, 0)"


class Writer:
    """Lines of one kernel with indentation, over the names a cell's kernels share."""

    def __init__(self, traced: Traced, unroll: int) -> None:
        cell = traced.cell
        self.traced, self.U = traced, unroll
        self.P, self.R, self.S = range(len(cell.pre)), range(len(cell.rec)), range(len(cell.state))
        self.curves = [(i, j, k) for i in self.S for j in self.S for k in range(j + 1)] if traced.second else []
        self.n_kept = len(cell.state) - 1  # states besides the emitted one
        self.lines: list[str] = []

    def put(self, indent: int, *lines: str) -> None:
        self.lines += ["    " * indent + line for line in lines if line]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def each(self, form: str, over: Sequence[int], **extra: int) -> str:
        return ", ".join(form.format(i=i, **extra) for i in over)

    def call(self, function: str, u: int, *states: str) -> str:
        arguments = [self.each("x{i}_{u}.to(tl.float32)", self.P, u=u), self.each("w{i}", self.R), *states]
        return f"{function}({', '.join(a for a in arguments if a)})"

    def matrix(self, form: str) -> list[str]:
        return [form.format(i=i, j=j) for i in self.S for j in self.S]

    def product(self, left: str, right: str, i: int, j: int) -> str:
        """Entry (i, j) of a product of S x S matrices; forms over i, m and m, j."""
        return " + ".join(left.format(i=i, m=m) + " * " + right.format(m=m, j=j) for m in self.S)

    def products(self, indent: int, u: int) -> None:
        """After step u of a group with the Jacobian j, from states that a reset r{u} made zero; at the group's end J and V follow."""
        if u == 0:
            self.put(indent, *(f"P{i}{j} = _keep(go, j{i}{j}, {float(i == j)}, EVEN)" for i in self.S for j in self.S))
            self.put(indent, "if HAS_RESET:", *(f"    {line}" for line in self.matrix("P{i}{j} = tl.where((r0 != 0) & go, 0.0, P{i}{j})")))
            return
        self.put(
            indent, "if HAS_RESET:", *(f"    {line}" for line in self.matrix(f"P{{i}}{{j}} = tl.where((r{u} != 0) & go, 0.0, P{{i}}{{j}})"))
        )
        self.put(indent, *(f"k{i}{j} = {self.product('j{i}{m}', 'P{m}{j}', i, j)}" for i in self.S for j in self.S))
        self.put(indent, *self.matrix("P{i}{j} = _keep(go, k{i}{j}, P{i}{j}, EVEN)"))

    def end_group(self, indent: int, meets: bool) -> None:
        """J and V at the end of a group; R, G and L too where walks may meet. Where states mix, products of absolute values bound those of products."""
        self.put(
            indent,
            *(f"k{i}{j} = {self.product('P{i}{m}', 'J{m}{j}', i, j)}" for i in self.S for j in self.S),
            *self.matrix("J{i}{j} = k{i}{j}"),
        )
        self.put(indent, *self.left("V", "P{i}{j}", "V{j}", "h{i}"))
        if meets:
            self.put(indent, *(f"k{i}{j} = {self.product('tl.abs(P{i}{m})', 'R{m}{j}', i, j)}" for i in self.S for j in self.S))
            self.put(indent, *(f"R{i}{j} = " + (f"_most(k{i}{j}, 1.0)" if i == j else f"k{i}{j}") for i in self.S for j in self.S))
            self.put(indent, *self.matrix("G{i}{j} = _most(G{i}{j}, R{i}{j})"))
            self.put(indent, *(f"L{i} = tl.where(t >= tail, _most(L{i}, tl.abs(h{i})), L{i})" for i in self.S))

    def end_curves(self, indent: int) -> None:
        """C at the end of a group, of whose steps the last one's second derivatives f{i}{j}{k} stand for all: they count where a memory is long, and
        there J hardly changes within a group. Those before the last reach its end by P: of a state that each step makes anew (an output gate's)
        they leave nothing there. After `end_group`."""
        for i, j, k in self.curves:
            bent = " + ".join(
                f"f{i}{a}{b} * " + (f"J{a}{j} * J{b}{k}" if a == b else f"(J{a}{j} * J{b}{k} + J{b}{j} * J{a}{k})")
                for a in self.S
                for b in range(a + 1)
            )
            self.put(indent, f"b{i}{j}{k} = {bent}", f"k{i}{j}{k} = C{i}{j}{k} + {self.U - 1.0} * b{i}{j}{k}")
        for i, j, k in self.curves:
            self.put(indent, f"C{i}{j}{k} = b{i}{j}{k} + " + " + ".join(f"P{i}{m} * k{m}{j}{k}" for m in self.S))

    def left(self, to: str, product: str, before: str, state: str) -> list[str]:
        """to{i} = the largest of |product| before over the states, and of |state|; not a number if one of them is not."""
        lines = []
        for i in self.S:
            text = f"tl.abs({state.format(i=i)})"
            for j in self.S:
                text = f"_most({text}, tl.abs({product.format(i=i, j=j)}) * {before.format(j=j)})"
            lines.append(f"next{to}{i} = {text}")
        return lines + [f"{to}{i} = next{to}{i}" for i in self.S]

    def shares(self, indent: int, to: str, change: str, size: str) -> None:
        """to = the largest share that changes of the states are of their sizes: what the certificate asks for."""
        self.put(indent, f"{to} = _share({change.format(i=0)}, {size.format(i=0)})")
        self.put(indent, *(f"{to} = tl.maximum({to}, _share({change.format(i=i)}, {size.format(i=i)}))" for i in self.S[1:]))

    def later_shares(self, indent: int, to: str, change: str) -> None:
        """Likewise of what comes of the changes later in the slice, and of the largest states there, by the walk that left oG and oL."""
        for i in self.S:
            self.put(indent, f"later{i} = " + " + ".join(f"_times(oG{i}{j}, tl.abs({change.format(i=j)}))" for j in self.S))
        self.shares(indent, to, "later{i}", "oL{i}")

    def measures(self) -> list[str]:
        return [*self.matrix("G{i}{j}"), *(f"L{i}" for i in self.S)]

    def store_measures(self, indent: int) -> None:
        n = len(self.S)
        self.put(
            indent,
            f"om = (b * n + s) * {n * n + n} * D + d",
            *(f"tl.store(MEASURES + om + {k} * D, {x}, mask=inside)" for k, x in enumerate(self.measures())),
        )

    def load_measures(self, indent: int) -> None:
        """What the slice's last walk left, as oG and oL."""
        n = len(self.S)
        self.put(
            indent,
            f"om = (b * n + s) * {n * n + n} * D + d",
            *(f"o{x} = {self.vector('MEASURES', 'om', k)}" for k, x in enumerate(self.measures())),
        )

    def begin(self, name: str, arguments: str, sliced: bool = True, after: bool = False) -> None:
        """The kernel's head: its tile of channels, its slice s of n, its batch row b. `after`: it may be launched before the kernel whose
        results it reads has ended (kernels/dispatch.py), and waits for it here."""
        self.put(0, "@triton.jit", f"def {name}({arguments}{', DEPENDENT: tl.constexpr' if after else ''}):")
        self.put(
            1,
            "BLOCKS: tl.constexpr = (D + BD - 1) // BD",
            "tile = tl.program_id(0) % BLOCKS",
            "b = (tl.program_id(0) // BLOCKS).to(tl.int64)",
        )
        self.put(1, "d = tile * BD + tl.arange(0, BD)", "inside = d < D")
        if sliced:
            self.put(1, "s = tl.program_id(1)", "n = tl.num_programs(1)")
        if after:
            self.put(1, "if DEPENDENT:", "    tl.extra.cuda.gdc_launch_dependents()", "    tl.extra.cuda.gdc_wait()")

    def weights(self) -> None:
        for r in self.R:
            self.put(1, f"w{r} = tl.load(REC + {r} * D + d, mask=inside, other=0.0)")

    def vector(self, name: str, where: str, i: int, live: str = "inside") -> str:
        """Load of entry i of a small fp32 array (..., S, D) at offset `where`."""
        return f"tl.load({name} + {where} + {i} * D, mask={live}, other=0.0)"

    def state_pointers(self, indent: int, t: str, emitted: str = "EMITTED", kept: str = "KEPT", prefix: str = "") -> None:
        """Pointers to the states after step t: the last state lies in EMITTED (B, T, D), the others in KEPT (B, T, S - 1, D)."""
        self.put(indent, f"{prefix}emit = {emitted} + (b * T + {t}) * D + d")
        if self.n_kept:
            self.put(indent, f"{prefix}kept = {kept} + (b * T + {t}) * {self.n_kept} * D + d")

    def state(self, i: int, u: int, prefix: str = "") -> str:
        """Address of state i, u steps after the pointers."""
        return f"{prefix}emit + {u} * D" if i == self.n_kept else f"{prefix}kept + {u * self.n_kept + i} * D"

    def move(self, indent: int, by: str, prefix: str = "") -> None:
        self.put(indent, f"{prefix}emit += {by} * D")
        if self.n_kept:
            self.put(indent, f"{prefix}kept += {by} * {self.n_kept} * D")

    def load_inputs(self, indent: int, t: str) -> None:
        """Inputs of the group at t, where p points."""
        for u in range(self.U):
            for k in self.P:
                self.put(indent, f"x{k}_{u} = _get(p + ({u} * ST + {k} * SP), {live(f'{t} + {u} < last')}, EVEN)")

    def load_tiles(self, indent: int, t: str) -> None:
        """Likewise, each projection as a tile."""
        self.open_tiles(indent, t)
        for k in self.P:
            self.tile(indent, f"x{k}", "p", f"each * ST + {k} * SP")

    def open_tiles(self, indent: int, t: str) -> None:
        self.put(indent, f"each = tl.arange(0, {self.U})[:, None]", f"there = ({t} + each < last) & inside[None, :]")

    def tile(self, indent: int, name: str, pointer: str, offset: str) -> None:
        """name_u of the steps u of a group, loaded as a tile of steps by channels and cut into its rows: a thread copies sixteen bytes, and not those
        of its own channels a step. offset: of the rows, of `each`. After `open_tiles`."""
        self.put(indent, f"{name}_ = _get(({pointer})[None, :] + ({offset}), there, EVEN)")
        if self.U == 1:
            return self.put(indent, f"{name}_0 = tl.reshape({name}_, (BD,))")
        self.put(indent, f"{name}_ = tl.reshape(tl.trans({name}_), (BD{', 2' * (self.U.bit_length() - 1)}))")
        pieces = {0: f"{name}_"}  # by their first step, of every 1, 2, 4 ..
        while len(pieces) < self.U:
            halves, n = dict[int, str](), len(pieces)
            for u, piece in pieces.items():
                halves[u], halves[u + n] = (f"{name}_{u}", f"{name}_{u + n}") if 2 * n == self.U else (f"{piece}a", f"{piece}b")
                self.put(indent, f"{halves[u]}, {halves[u + n]} = tl.split({piece})")
            pieces = halves
        return None

    def load_resets(self, indent: int, prefix: str, t: str) -> None:
        """Resets of the group at t, where q points."""
        self.put(indent, "if HAS_RESET:")
        self.put(indent + 1, *(f"{prefix}r{u} = tl.load(q + {u}, mask={t} + {u} < last, other=0)" for u in range(self.U)))

    def next_resets(self, indent: int) -> None:
        self.put(indent, "if HAS_RESET:", *(f"    r{u} = nr{u}" for u in range(self.U)))
