"""Emits `shoot`, the forward kernel of small problems: one launch, every time slice of a tile of channels in one program.

The other kernels give a slice a program and pay a launch for every exchange between slices. Here a program's tile is two-dimensional, slices by
channels: it walks all its slices in step, keeps the products of their Jacobians, and makes Newton's step on the slice starts by a scan over its
rows, as often as the residual asks for. After MOST such steps each slice starts from the end of the one before it, which makes one more slice
exact a turn, so n + MOST turns always end it.
"""

from __future__ import annotations

from kernels.parallel_rnn.forward_source import steps
from kernels.parallel_rnn.trace import Traced
from kernels.parallel_rnn.writer import SIZES, Writer, live


def compose(traced: Traced) -> str:
    """The scan's operation: affine maps c -> J c + r of the starts' changes, the earlier one first. Nothing stays nothing under any Jacobian."""
    w = Writer(traced, 1)
    sides = [[*w.matrix(f"J{side}{{i}}{{j}}"), *(f"r{side}{i}" for i in w.S)] for side in "ab"]
    w.put(0, "@triton.jit", f"def _compose({', '.join(sides[0] + sides[1])}):")
    products = [" + ".join(f"_times(Jb{i}{m}, Ja{m}{j})" for m in w.S) for i in w.S for j in w.S]
    offsets = [" + ".join([*(f"_times(Jb{i}{m}, ra{m})" for m in w.S), f"rb{i}"]) for i in w.S]
    w.put(1, f"return {', '.join(products + offsets)}")
    return w.text()


def shoot(traced: Traced, unroll: int) -> str:
    w, n = Writer(traced, unroll), len(traced.cell.state)
    own = "PRE, REC, H0, RESET, EMITTED, KEPT, MARKS, STARTS, FINAL, STATS, TOLERANCE, MOST, ROWS: tl.constexpr, DEEP: tl.constexpr"
    w.begin("shoot", f"{own}, WITH_MARKS: tl.constexpr,\n        {SIZES}", sliced=False)
    w.put(1, "d = d[None, :]", "inside = d < D", "s = tl.arange(0, ROWS)[:, None]", "first = s * SLICE", "n = (T + SLICE - 1) // SLICE")
    w.put(1, "last = T - first  # of the steps of a row, counted from its first")
    w.weights()
    w.put(1, f"o = b * {n} * D + d", *(f"h{i} = tl.where(s == 0, {w.vector('H0', 'o', i)}, 0.0)" for i in w.S))
    w.put(1, *(f"next{i} = h{i} * 0.0  # the start of the row below" for i in w.S))
    w.put(1, "columns = _columns(tile, se, D, HEAD, BD)[None, :]", f"begin = STARTS + (b * ROWS + s) * {n} * D + d")
    w.put(1, "turn = 0", "gap = 0.0", "again = 1", "while again != 0:")
    w.put(2, *(f"J{i}{j} = h{i} * 0.0 + {float(i == j)}" for i in w.S for j in w.S), *(f"V{i} = tl.abs(h{i})" for i in w.S))
    w.put(2, "p = PRE + b * sb + first.to(tl.int64) * ST + columns", "q = RESET + b * T + first")
    w.state_pointers(2, "first")
    w.put(2, f"mark = MARKS + (b * ((T + MARK - 1) // MARK) + first // MARK) * {n} * D + d")
    w.put(2, f"for t in tl.range(0, SLICE, {w.U}, num_stages=DEEP):")
    w.load_inputs(3, "t")
    w.load_resets(3, "", "t")
    w.put(3, f"p += {w.U} * ST", f"q += {w.U}")
    steps(w, 3, "True", stored="go & (turn > 0)", even="False", meets=False)  # what the first turn finds never stands
    w.move(3, str(w.U))
    w.put(3, "if WITH_MARKS:", f"    if (t + {w.U}) % MARK == 0:")
    w.put(5, *(f"tl.store(mark + {i} * D, h{i}, mask={live(f't + {w.U} - MARK < last')})" for i in w.S), f"mark += {n} * D")
    w.put(2, *(f"r{i} = h{i} - next{i}" for i in w.S))
    maps = ", ".join([*w.matrix("J{i}{j}"), *(f"r{i}" for i in w.S)])
    w.put(2, f"{', '.join([*w.matrix('_J{i}{j}'), *(f'c{i}' for i in w.S)])} = tl.associative_scan(({maps}), 0, _compose)")
    w.put(2, "fine = (turn < MOST) & " + " & ".join(f"(tl.abs(c{i} - r{i}) <= 3.0e38)" for i in w.S))
    w.put(
        2,
        *(f"c{i} = h{i} + tl.where(fine, c{i} - r{i}, 0.0)" for i in w.S),
        *(f"r{i} = c{i} - next{i}" for i in w.S),
        *(f"next{i} = c{i}" for i in w.S),
    )
    w.shares(2, "far", "r{i}", "V{i}")  # of what this row alone leaves: of the rows above it may be more
    below = live("s < n - 1")
    w.put(2, f"gap = tl.max(tl.where({below}, far, 0.0))")
    w.put(2, "turn += 1", "again = (((gap > TOLERANCE) & (turn <= n + MOST)) | (turn < 2)).to(tl.int32)")
    w.put(2, "if again != 0:  # every row takes its start from the one above")
    w.put(3, *(f"tl.store(begin + {n + i} * D, next{i}, mask={below})" for i in w.S), "tl.debug_barrier()")
    w.put(
        3,
        *(
            f"h{i} = tl.where(s == 0, {w.vector('H0', 'o', i)}, tl.load(begin + {i} * D, mask={live('(s > 0) & (s < n)')}, other=0.0))"
            for i in w.S
        ),
    )
    w.put(3, "tl.debug_barrier()")
    w.put(1, *(f"tl.store(FINAL + o + {i} * D + s * 0, h{i}, mask={live('s == n - 1')})" for i in w.S))
    w.put(1, "tl.atomic_max(STATS + 0, gap)", "tl.atomic_max(STATS + 1, (turn - 1).to(tl.float32))", "tl.atomic_add(STATS + 2, 1.0)")
    w.put(1, "if (turn > MOST + 1) & (turn > 2):", "    tl.atomic_add(STATS + 3, 1.0)")
    return w.text()
