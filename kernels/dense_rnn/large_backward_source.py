"""The adjoint of large heads, as kernels/dense_rnn/large_source.py writes the states: each slice walked backwards, with the matrices transposed.

A phase multiplies the cotangents V of a level's products, and goes on to those of the level before, or, at the first level, ends the step and begins
the one before it (`_open`). BEFORE are the emitted states that steps start from, PROD the products of all steps. a{i} is the adjoint carried.
"""

from __future__ import annotations

from kernels.dense_rnn.large_source import begin, between, bias_of, bounds, columns, end, head, inputs, meet, near, of_operand, reset
from kernels.dense_rnn.source import Writer, products_of_jacobians

BACKWARD = (
    "PRE, REC, MAT, RESET, BEFORE, KEPT, H0, PROD, D_EMITTED, D_KEPT, D_FINAL, D_PRE, D_PROD, PARTIAL, BEGINS, ENDS, PRODUCTS, NEARBY"
)
BACKWARD += ", TODO, BAD, D_H0, V, SCALES, LATER, db, dt, dp, de, WITH_KEPT: tl.constexpr, SCALED: tl.constexpr, SAME: tl.constexpr"


def summed(w: Writer) -> tuple[int, ...]:
    """The weights whose gradient the walk sums over steps; that of a bias is the sum of an input projection's."""
    return tuple(r for r in w.W if bias_of(w.dense, r) is None)


def begin_back(w: Writer, sums: tuple[int, ...]) -> None:
    """The adjoints that rows begin with, the sums over steps, and the steps of this launch."""
    begin(w, 3, "a", ("D_FINAL", "ENDS", "D_H0"), "origin + 1 + BURN >= T")
    w.put(3, "if MODE < 0:" if sums else "", *(f"    W{i} = tl.zeros((BM, BN), tl.float32)" for i in sums), "else:" if sums else "")
    w.put(4, *(f"W{i} = {w.vector('PARTIAL', 'own', i, len(w.W), 'all_')}" for i in sums))
    bounds(w)


def states_before(w: Writer, indent: int) -> None:
    """A step's inputs and the states before it."""
    n_kept = len(w.S) - 1
    inputs(w, indent, "t", "both", list(w.X))
    w.put(indent, f"h{n_kept} = tl.load(BEFORE + at[:, None] * D + d, mask=both, other=0.0).to(tl.float32)")
    for i in range(n_kept):
        w.put(indent, f"h{i} = tl.load(KEPT + ((at - 1) * {n_kept} + {i})[:, None] * D + d, mask=both & (t > 0)[:, None], other=0.0)")
        w.put(indent, f"h{i} += {w.vector('H0', 'b', i, len(w.S), 'both & (t == 0)[:, None]')}")


def products_made(w: Writer, indent: int) -> None:
    """Whether a document starts at a step, and its products."""
    w.put(indent, "if HAS_RESET:")
    reset(w, indent + 1, "r", "t", "live")
    w.put(indent + 1, *(f"h{i} = tl.where(r, 0.0, h{i})" for i in range(len(w.S) - 1)))
    w.put(indent, f"q_ = PROD + ((e.to(tl.int64) * B * T + at) * ({len(w.Q)} * K))[:, None] + k[None, :]")
    w.put(indent, *(f"p{i} = tl.load(q_ + {i} * K, mask=both, other=0.0)" for i in w.Q))


def at_border(w: Writer, indent: int, sums: tuple[int, ...]) -> None:
    """Where a slice ends: the adjoints that it begins with are kept, its products of Jacobians and sums begin."""
    for i in w.S:
        w.keep(indent, "BEGINS", "place", i, len(w.S), f"a{i}", "all_ & border")
    w.put(indent, *(f"P{i}{j} = tl.where(border, {float(i == j)}, P{i}{j})" for i, j in w.tracked))
    w.put(indent, *(f"{name} = tl.where(border, 0.0, {name})" for name in (f"W{i}" for i in sums)))


def jacobians(w: Writer, indent: int) -> None:
    """The Jacobian's entries, and their products."""
    entries = [f"j{i}{j}" for i, j in w.tracked]
    w.put(indent, f"{', '.join(entries)} = jacobian({w.given()})" if entries else "")
    w.put(indent, "if HAS_RESET:" if entries else "", *(f"    {j} = tl.where(r, 0.0, {j})" for j in entries))
    products_of_jacobians(w, indent, back=True)


def cut(w: Writer, indent: int) -> None:
    """Nothing goes back over a document's start."""
    w.put(indent, "if HAS_RESET:", *(f"    dh{i} = tl.where(r, 0.0, dh{i})" for i in w.S))


def gradients_out(w: Writer, indent: int, sums: tuple[int, ...]) -> None:
    """Stores a step's gradients of inputs, but where those of products are the SAME and lie there already, adds those of weights, and goes on to the
    adjoints of the states before it."""
    w.put(indent, "if not SAME:", "    to = D_PRE + (b * db + t.to(tl.int64) * dt)[:, None] + columns_out")
    w.put(indent + 1, *(f"tl.store(to + {i} * dp, dx{i}.to(D_PRE.dtype.element_ty), mask=kept)" for i in w.X))
    w.put(indent, *(f"W{i} += tl.where(go, dw{i}, 0.0)" for i in sums), *(f"a{i} = tl.where(go, dh{i}, a{i})" for i in w.S))


def walk_back(w: Writer) -> None:
    dense, deep, sums = w.dense, 4, summed(w)
    head(w, "walk_back", BACKWARD, back=True)
    columns(w, 3, "columns", "se")
    columns(w, 3, "columns_out", "de")
    begin_back(w, sums)
    _open(w, 4, "begin", "parity")
    meet(w, 4)
    w.put(3, "for it in tl.range(begin, end, num_stages=1):", "    parity = (it + BURN) & 1")
    for l in reversed(range(len(dense.levels))):
        w.put(deep, f"if (MODE == -2) | (MODE == {l}):")
        _phase_back(w, deep + 1, l)
        meet(w, deep + 1)
    end(w, "a", "D_H0", sums)


def _known(w: Writer, indent: int) -> None:
    """What a step reads: inputs, the states before it, its products, and the adjoints g of those after it."""
    n_kept = len(w.S) - 1
    w.put(indent, "live = here & (t >= low) & (t < T)", "go = live[:, None]", "both = go & inside", "at = b * T + t")
    states_before(w, indent)
    w.put(indent, f"g{n_kept} = a{n_kept} + tl.load(D_EMITTED + at[:, None] * D + d, mask=both, other=0.0).to(tl.float32)")
    w.put(indent, *(f"g{i} = a{i}" for i in range(n_kept)))
    if n_kept:
        w.put(indent, "if WITH_KEPT:")
        for i in range(n_kept):
            w.put(indent + 1, f"g{i} += tl.load(D_KEPT + (at * {n_kept} + {i})[:, None] * D + d, mask=both, other=0.0).to(tl.float32)")
    products_made(w, indent)


def _cotangents(w: Writer, indent: int, level: int, parity: str) -> None:
    """This program's share of the cotangents of a level's products."""
    dense = w.dense
    later = {i for above in dense.levels[level + 1 :] for i in above}
    q = [f"q{i}" if i in later else "h0" for i in range(len(dense.operands))]
    mine = dense.of_level(level)
    w.put(indent, f"{', '.join(f'dp{i}' for i in mine)} = d_products{level}({w.given()}, {', '.join([*(f'g{i}' for i in w.S), *q])})")
    size = f"tl.abs(dp{mine[0]})"
    for i in mine[1:]:
        size = f"tl.maximum({size}, tl.abs(dp{i}))"
    w.put(indent, "if SCALED:  # to the middle of the range that 16 bits have", f"    size = tl.max(tl.where(all_, {size}, 0.0), 1)")
    w.put(indent + 1, "size = tl.where((size > 1.0e-37) & (size < 1.0e37), tl.exp2(-tl.floor(tl.log2(size))), 1.0)")
    place = f"SCALES + ((({parity}) * {len(dense.levels)} + {level}) * RT + rows).to(tl.int64) * (E * C) + e * C"
    w.put(indent + 1, f"tl.store({place} + c, 1.0 / size, mask=here)", *(f"dq{i} = dp{i} * size[:, None]" for i in mine))
    w.put(indent, "else:", *(f"    dq{i} = dp{i}" for i in mine))
    for i in mine:
        w.put(indent, f"v_ = V + (({parity}) * {len(w.Q)} + {i}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP")
        w.put(indent, f"tl.store(v_ + k[None, :], dq{i}.to(DOT), mask=all_)")
    w.put(indent, f"to = D_PROD + ((e.to(tl.int64) * B * T + at) * ({len(w.Q)} * K))[:, None] + k[None, :]")
    for i in mine:
        w.put(indent, f"tl.store(to + {i} * K, dp{i}.to(D_PROD.dtype.element_ty), mask=both & (t <= origin)[:, None])")


def _open(w: Writer, indent: int, it: str, parity: str) -> None:
    """The first cotangents of a step."""
    sums = summed(w)
    w.put(indent, f"t = origin - ({it})", "if FIRST:", "    border = (t == origin)[:, None]")
    at_border(w, indent + 1, sums)
    _known(w, indent)
    _cotangents(w, indent, len(w.dense.levels) - 1, parity)


def _multiply_back(w: Writer, indent: int, level: int) -> None:
    """Cotangents of a level's operands, of those of products that the whole team wrote. MAT here: (E, products, KP, KP) transposed."""
    dense = w.dense
    for operand in dense.levels[level]:
        w.put(
            indent,
            f"q{operand} = tl.zeros((BM, BN), tl.float32)",
            "far_ = (parity * 0 + 1).to(tl.int64) * RT * W  # from a product's cotangents on",
        )
        for i, count in _runs(of_operand(dense, operand)):  # one loop for all, which fills its tiles in flight once
            w.put(
                indent,
                f"v_ = V + (parity * {len(w.Q)} + {i}).to(tl.int64) * RT * W + rows[:, None].to(tl.int64) * W + e * KP + ks[None, :]",
            )
            w.put(indent, f"m_ = MAT + (e.to(tl.int64) * {len(w.Q)} + {i}) * KP * KP + ks[:, None] * KP + k[None, :]")
            w.put(indent, f"s_ = SCALES + ((parity * {len(dense.levels)} + {level}) * RT + rows).to(tl.int64) * (E * C) + e * C")
            w.put(indent, f"for at_ in tl.range(0, {count} * KP, BK, num_stages=STAGES):")
            w.put(indent + 1, "there_ = tl.multiple_of(at_ // KP * far_ + at_ % KP, 16)  # else the copies would not be on their way ahead")
            w.put(indent + 1, "if SCALED:  # each program has its own, of BK = BN columns")
            one = "tl.dot(tl.load(v_ + there_), tl.load(m_ + at_ * KP)"
            scale = "tl.load(s_ + at_ % KP // BN, mask=here, other=0.0)[:, None]"
            w.put(indent + 2, f"q{operand} += {one}, input_precision=PRECISION) * {scale}")
            w.put(indent + 1, "else:", f"    q{operand} = {one}, q{operand}, input_precision=PRECISION)")
        # where it is: values gathered lie as what gathers them does, else all that a step reads were brought into the order that products lie in, and
        # all that it stores back, at two barriers each
        w.put(indent, f"q{operand} = tl.gather(q{operand}, tl.zeros((BM, BN), tl.int32) + tl.arange(0, BN)[None, :], 1)")


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """(first, how many) of numbers that follow one another."""
    starts = [i for i in numbers if i - 1 not in numbers]
    return [(i, next(count for count in range(1, len(numbers) + 1) if i + count not in numbers)) for i in starts]


def _phase_back(w: Writer, indent: int, level: int) -> None:
    dense, operands, sums = w.dense, len(w.dense.operands), summed(w)
    _multiply_back(w, indent, level)
    w.put(indent, "t = origin - it")
    _known(w, indent)  # what `_open` read before the meeting; carried over it, it would not fit into registers
    later = [i for above in dense.levels[level + 1 :] for i in above]
    between(w, indent, "LATER", [f"q{i}" for i in later], operands, load=True)
    if level:
        between(w, indent, "LATER", [f"q{i}" for i in dense.levels[level]], operands, load=False)
        _cotangents(w, indent, level - 1, "parity")
        return
    cotangents = ", ".join([f"g{i}" for i in w.S] + [f"q{i}" for i in range(operands)])
    results = [f"dx{i}" for i in w.X] + [f"dw{i}" for i in w.W] + [f"dh{i}" for i in w.S]
    w.put(indent, f"{', '.join(results)} = gradients({w.given()}, {cotangents})")
    jacobians(w, indent)
    cut(w, indent)
    near(w, indent, "g", back=True)
    w.put(indent, "kept = both & (it >= 0)")
    gradients_out(w, indent, sums)
    _open(w, indent, "it + 1", "1 - parity")
