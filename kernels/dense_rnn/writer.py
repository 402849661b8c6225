"""The writer of the kernels of a cell with dense heads: lines, products with the head's matrices, loads and stores, and what the kernels of a cell
have in common. `Writer` has a program's rows along the first axis of all values, `Narrow` along the second.

Names in the text are those of kernels/dense_rnn/source.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kernels.parallel_rnn.products import Dense, apart

SIZES = "T, SLICE, n, B, sb, st, sp, se, K: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, NEAR: tl.constexpr"
WIDTHS = "HAS_RESET: tl.constexpr, HALVES: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr"
# sizes that plans change: another plan is no reason to compile again; but one slice is, where a step is a tenth to a third quicker
JIT = '@triton.jit(do_not_specialize_on_alignment=["T", "SLICE", "n", "B", "BURN", "N", "PIECE"])'


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


def _turned(line: str) -> str:
    """A line of kernels with the axes of rows and channels changed; of what has one axis, or more than two, nothing is."""
    line = line.replace("[:, None]", "[@]").replace("[None, :]", "[:, None]").replace("[@]", "[None, :]")
    return re.sub(r"\(BM, BK\b", "(BK, BM", line)
