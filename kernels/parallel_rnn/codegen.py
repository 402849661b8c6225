"""Writes the Triton source of a cell's kernels. Print it with `python -m kernels.parallel_rnn.codegen paragru`.

Four kernels a cell, all channel-last; a program owns BD neighbouring channels of one time slice and walks it step by step with the state in
registers. The loads of the next UNROLL steps are issued before the arithmetic of the current ones, because the compiler keeps loads behind
the stores in between and each step would otherwise wait for memory.

    forward   states of all slices from given (or burnt-in) starts; with END and PROD also each slice's end and Jacobian product
    correct   one Newton step on the slice starts by a scan over the slices; the largest mismatch decides the CONVERGED flag
    adjoint   reversed linear sweep: each slice's local adjoint and product of transposed Jacobians
    gradient  reversed sweep from the true adjoints: gradients of pre, h0, and per-slice partial sums for rec
(`scan_adjoint` between the last two is the scan over the slices.)

Legend: B batch, T time, N slices, P input projections, R recurrent weights, S states, D channels.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.trace import Node, NotLowered, Traced, order, trace

UNROLL = 8  # steps loaded ahead
UNROLL_BACK = 2  # a step of the backward pass carries more: fewer ahead leave registers for more programs at once

HEADER = '''"""Kernels of the cell {name}, written by kernels/parallel_rnn/codegen.py."""
import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp2(-2.8853900817779268 * x)) - 1.0


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp2(-1.4426950408889634 * tl.abs(x)))
'''
FORMS = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "sigmoid": "_sigmoid({})",
    "tanh": "_tanh({})", "exp": "tl.exp2(1.4426950408889634 * {})", "log": "tl.log({})", "sqrt": "tl.sqrt({})", "softplus": "_softplus({})",
    "relu": "tl.maximum({}, 0.0)", "positive_mask": "tl.where({} > 0.0, 1.0, 0.0)",
}  # fmt: skip


IN_TORCH = {
    **FORMS, "sigmoid": "torch.sigmoid({})", "tanh": "torch.tanh({})", "exp": "torch.exp({})", "log": "torch.log({})", "sqrt": "torch.sqrt({})",
    "softplus": "torch.nn.functional.softplus({})", "relu": "torch.relu({})", "positive_mask": "torch.gt({}, 0.0).to(torch.get_default_dtype())",
}  # fmt: skip


def bare(text: str) -> str:
    """Without one pair of outer brackets, where they enclose the whole."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text


def function(name: str, arguments: Sequence[str], results: Sequence[Node], like: str, forms: dict[str, str] = FORMS) -> str:
    """A jitted function of the expressions; values used once are written in place, shared ones get a line. Constants become tensors
    shaped as `like`."""
    nodes = order(results)
    uses: dict[int, int] = {}
    for node in nodes:
        for argument in node.arguments if node.op not in ("var", "const") else ():
            uses[id(argument)] = uses.get(id(argument), 0) + 1
    text: dict[int, str] = {}
    lines = [("@triton.jit\n" if forms is FORMS else "") + f"def {name}({', '.join(arguments)}):"]
    for node in nodes:
        if node.op in ("var", "const"):
            text[id(node)] = node.arguments[0] if node.op == "var" else repr(node.arguments[0])
            continue
        form = forms[node.op].format(*(text[id(a)] for a in node.arguments))
        if uses.get(id(node), 0) > 1 or len(form) > 90:
            text[id(node)] = f"v{len(lines)}_"
            lines.append(f"    v{len(lines)}_ = {bare(form)}")
        else:
            text[id(node)] = form
    out = [bare(text[id(n)]) if n.op != "const" else f"{'tl' if forms is FORMS else 'torch'}.zeros_like({like}) + {text[id(n)]}" for n in results]
    return "\n".join([*lines, f"    return {', '.join(out)}"]) + "\n"


class Writer:
    """Lines of one kernel with indentation, over the names a cell's kernels share: x_p (inputs), w_r (weights), h_i (states)."""

    def __init__(self, traced: Traced, unroll: int) -> None:
        cell = traced.cell
        self.traced, self.U = traced, unroll
        self.P, self.R, self.S = range(len(cell.pre)), range(len(cell.rec)), range(len(cell.state))
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

    def weights(self) -> None:
        for r in self.R:
            self.put(1, f"w{r} = tl.load(REC + {r} * D + d, mask=inside, other=0.0)")


def matrix(form: str, S: Sequence[int]) -> list[str]:
    return [form.format(i=i, j=j) for i in S for j in S]


def program(w: Writer, name: str, arguments: str) -> None:
    w.put(0, "@triton.jit", f"def {name}({arguments}, BD: tl.constexpr):")
    w.put(1, "d = tl.program_id(0) * BD + tl.arange(0, BD)", "inside = d < D")


def forward(traced: Traced, unroll: int) -> str:
    w = Writer(traced, unroll)
    S, U, n_state = w.S, unroll, len(w.S)
    program(
        w,
        "forward",
        "PRE, REC, H0, RESET, STATES, START, END, PROD, FINAL, CONVERGED, T, D, SLICE, BURN, sb, st, sp,\n"
        "            HAS_RESET: tl.constexpr, GUESS: tl.constexpr, CHECK: tl.constexpr, SLICED: tl.constexpr",
    )
    w.put(1, "s = tl.program_id(1)", "n = tl.num_programs(1)", "b = tl.program_id(2).to(tl.int64)")
    w.put(1, "if CHECK:", "    if tl.load(CONVERGED + b * tl.num_programs(0) + tl.program_id(0)) != 0:", "        return")
    w.weights()
    w.put(1, "first = s * SLICE", "last = tl.minimum(first + SLICE, T)", "begin = first")
    w.put(1, f"o = (b * n + s) * {n_state} * D + d", f"o0 = b * {n_state} * D + d")
    w.put(1, "if GUESS:  # burn in from zero, or from h0 where the burn-in reaches the beginning", "    begin = tl.maximum(first - BURN, 0)")
    for i in S:
        w.put(2, f"h{i} = tl.load(H0 + o0 + {i} * D, mask=d < tl.where(begin == 0, D, 0), other=0.0)")
    w.put(1, "else:")
    for i in S:
        w.put(2, f"h{i} = tl.load(START + o + {i} * D, mask=inside, other=0.0)")
    w.put(1, *(f"J{i}{j} = tl.full((BD,), {float(i == j)}, tl.float32)" for i in S for j in S))
    w.put(1, "p = PRE + b * sb + begin.to(tl.int64) * st + d", "q = RESET + b * T + begin")
    w.put(1, f"out = STATES + (b * T + begin) * {n_state} * D + d")
    load = "tl.load({p}, mask=d < tl.where({t} < last, D, 0), other=0.0)"
    reset = "tl.load({p}, mask={t} < last, other=0)"
    for u in range(U):
        w.put(1, *(f"x{k}_{u} = " + load.format(p=f"p + {u} * st + {k} * sp", t=f"begin + {u}") for k in w.P))
    w.put(1, "if HAS_RESET:")
    w.put(2, *(f"r{u} = " + reset.format(p=f"q + {u}", t=f"begin + {u}") for u in range(U)))
    w.put(1, f"for t in range(begin, last, {U}):", f"    p += {U} * st", f"    q += {U}")
    for u in range(U):
        w.put(2, *(f"n{k}_{u} = " + load.format(p=f"p + {u} * st + {k} * sp", t=f"t + {U + u}") for k in w.P))
    w.put(2, "if HAS_RESET:")
    w.put(3, *(f"m{u} = " + reset.format(p=f"q + {u}", t=f"t + {U + u}") for u in range(U)))
    w.put(2, "if GUESS and SLICED:", "    if t == first:")
    w.put(4, *(f"tl.store(START + o + {i} * D, h{i}, mask=inside)" for i in S))
    hs = w.each("h{i}", S)
    for u in range(U):
        w.put(2, f"go = t + {u} < last", "if HAS_RESET:")
        w.put(3, *(f"h{i} = tl.where(r{u} != 0, 0.0, h{i})" for i in S))
        w.put(2, "if SLICED:", "    count = go & (t >= first)", "    if HAS_RESET:")
        w.put(4, *matrix(f"J{{i}}{{j}} = tl.where((r{u} != 0) & count, 0.0, J{{i}}{{j}})", S))
        w.put(3, f"{w.each('y{i}', S)}, {', '.join(matrix('j{i}{j}', S))} = {w.call('step_and_jacobian', u, hs)}")
        for j in S:
            w.put(3, *(f"k{i}{j} = " + " + ".join(f"j{i}{m} * J{m}{j}" for m in S) for i in S))
        w.put(3, *matrix("J{i}{j} = tl.where(count, k{i}{j}, J{i}{j})", S))
        w.put(2, "else:", f"    {w.each('y{i}', S)} = {w.call('step', u, hs)}")
        w.put(2, *(f"h{i} = tl.where(go, y{i}, h{i})" for i in S))
        for i in S:
            w.put(2, f"tl.store(out + {u * n_state + i} * D, h{i}.to(STATES.dtype.element_ty), mask=d < tl.where(go & (t >= first), D, 0))")
    w.put(2, f"out += {U * n_state} * D")
    w.put(2, *(f"x{k}_{u} = n{k}_{u}" for u in range(U) for k in w.P))
    w.put(2, "if HAS_RESET:")
    w.put(3, *(f"r{u} = m{u}" for u in range(U)))
    w.put(1, "if SLICED:")
    w.put(2, *(f"tl.store(END + o + {i} * D, h{i}, mask=inside)" for i in S))
    w.put(2, f"oo = (b * n + s) * {n_state**2} * D + d")
    w.put(2, *matrix(f"tl.store(PROD + oo + ({{i}} * {n_state} + {{j}}) * D, J{{i}}{{j}}, mask=inside)", S))
    w.put(1, "if s == n - 1:")
    w.put(2, *(f"tl.store(FINAL + o0 + {i} * D, h{i}, mask=inside)" for i in S))
    return w.text()


def correct(traced: Traced) -> str:
    w = Writer(traced, 1)
    S, n_state = w.S, len(w.S)
    program(w, "correct", "START, END, PROD, CONVERGED, RESIDUAL, COUNT, N, D, TOLERANCE")
    w.put(1, "b = tl.program_id(1).to(tl.int64)", "tile = b * tl.num_programs(0) + tl.program_id(0)")
    w.put(1, "if tl.load(CONVERGED + tile) != 0:", "    return")
    w.put(1, *(f"c{i} = tl.zeros((BD,), tl.float32)  # change of this slice's start" for i in S))
    w.put(1, "worst = tl.zeros((BD,), tl.float32)", f"o = b * N * {n_state} * D + d", f"oo = b * N * {n_state**2} * D + d")
    w.put(1, "for s in range(0, N - 1):")
    w.put(2, *(f"e{i} = tl.load(END + o + {i} * D, mask=inside, other=0.0)" for i in S))
    w.put(2, *(f"a{i} = tl.load(START + o + {n_state + i} * D, mask=inside, other=0.0)" for i in S))
    w.put(2, *matrix(f"J{{i}}{{j}} = tl.load(PROD + oo + ({{i}} * {n_state} + {{j}}) * D, mask=inside, other=0.0)", S))
    for i in S:
        w.put(2, f"gap = tl.abs(a{i} - e{i}) / (1.0 + tl.abs(e{i}))", "worst = tl.maximum(worst, tl.where(gap <= 3.0e38, gap, 3.0e38))")
    w.put(2, "same = " + " & ".join(f"(c{i} == 0.0)" for i in S) + "  # then the end is this slice's exact one, whatever the Jacobian")
    w.put(2, *(f"k{i} = " + " + ".join(f"J{i}{j} * c{j}" for j in S) for i in S))
    w.put(2, "same = same | ~(" + " & ".join(f"(tl.abs(k{i}) <= 3.0e38)" for i in S) + ")")
    for i in S:
        w.put(2, f"k{i} = e{i} + tl.where(same, 0.0, k{i})", f"tl.store(START + o + {n_state + i} * D, k{i}, mask=inside)", f"c{i} = k{i} - a{i}")
    w.put(2, f"o += {n_state} * D", f"oo += {n_state**2} * D")
    w.put(1, "residual = tl.max(tl.where(inside, worst, 0.0), 0)", "tl.store(RESIDUAL + tile, residual)")
    w.put(1, "if residual <= TOLERANCE:", "    tl.store(CONVERGED + tile, 1)")
    w.put(1, "else:", "    tl.store(COUNT + tile, tl.load(COUNT + tile) + 1)")
    return w.text()


def backward(traced: Traced, unroll: int, write: bool) -> str:
    """`adjoint` (write False) or `gradient`: the reversed walk of a slice, D-states and products or all gradients."""
    w = Writer(traced, unroll)
    S, U, n_state = w.S, unroll, len(w.S)
    own = "D_PRE, D_REC, D_H0" if write else "END, PROD, D_FINAL"
    program(w, "gradient" if write else "adjoint", f"PRE, REC, H0, RESET, STATES, D_STATES, CARRY, {own}, T, D, SLICE, sb, st, sp, HAS_RESET: tl.constexpr")
    w.put(1, "s = tl.program_id(1)", "n = tl.num_programs(1)", "b = tl.program_id(2).to(tl.int64)")
    w.weights()
    w.put(1, "first = s * SLICE", "last = tl.minimum(first + SLICE, T)", f"o = (b * n + s) * {n_state} * D + d", f"o0 = b * {n_state} * D + d")
    w.put(1, *(f"first{i} = tl.load(H0 + o0 + {i} * D, mask=inside, other=0.0)" for i in S))
    if write:
        w.put(1, *(f"g{i} = tl.load(CARRY + o + {i} * D, mask=inside, other=0.0)" for i in S))
        w.put(1, *(f"dw{r} = tl.zeros((BD,), tl.float32)" for r in w.R))
    else:
        w.put(1, *(f"g{i} = tl.load(D_FINAL + o0 + {i} * D, mask=d < tl.where(s == n - 1, D, 0), other=0.0)" for i in S))
        w.put(1, *(f"J{i}{j} = tl.full((BD,), {float(i == j)}, tl.float32)" for i in S for j in S))
    w.put(1, f"top = first + ((last - first - 1) // {U}) * {U}")
    w.put(1, "p = PRE + b * sb + top.to(tl.int64) * st + d", "q = RESET + b * T + top", f"h = STATES + (b * T + top) * {n_state} * D + d")
    w.put(1, f"dh = D_STATES + (b * T + top) * {n_state} * D + d")
    if write:
        w.put(1, f"dp = D_PRE + (b * T + top) * {len(w.P)} * D + d")

    def loads(indent: int, prefix: str, t: str) -> None:
        live = f"({t} + {{u}} < last) & ({t} + {{u}} >= first)"
        for u in range(U):
            here = live.format(u=u)
            w.put(indent, *(f"{prefix}x{k}_{u} = tl.load(p + {u} * st + {k} * sp, mask=d < tl.where({here}, D, 0), other=0.0)" for k in w.P))
            back = f"{here} & ({t} + {u} >= 1)"
            w.put(indent, *(f"{prefix}h{i}_{u} = tl.load(h + {(u - 1) * n_state + i} * D, mask=d < tl.where({back}, D, 0), other=0.0)" for i in S))
            w.put(indent, *(f"{prefix}e{i}_{u} = tl.load(dh + {u * n_state + i} * D, mask=d < tl.where({here}, D, 0), other=0.0)" for i in S))
        w.put(indent, "if HAS_RESET:")
        w.put(indent + 1, *(f"{prefix}r{u} = tl.load(q + {u}, mask={live.format(u=u)}, other=0)" for u in range(U)))

    loads(1, "", "top")
    w.put(1, f"for back in range(0, last - first, {U}):", "    t = top - back")
    w.put(2, f"p -= {U} * st", f"q -= {U}", f"h -= {U * n_state} * D", f"dh -= {U * n_state} * D")
    loads(2, "n", f"t - {U}")
    for u in reversed(range(U)):
        w.put(2, f"go = t + {u} < last")
        w.put(2, *(f"a{i} = tl.where(t + {u} == 0, first{i}, h{i}_{u}.to(tl.float32))" for i in S))
        w.put(2, "if HAS_RESET:", *(f"    a{i} = tl.where(r{u} != 0, 0.0, a{i})" for i in S))
        w.put(2, *(f"z{i} = e{i}_{u}.to(tl.float32) + g{i}" for i in S))
        states = f"{w.each('a{i}', S)}"
        if write:
            names = [*(f"y{k}" for k in w.P), *(f"c{r}" for r in w.R), *(f"k{i}" for i in S)]
            w.put(2, f"{', '.join(names)} = {w.call('step_vjp', u, states, w.each('z{i}', S))}")
            for k in w.P:
                w.put(2, f"tl.store(dp + {u * len(w.P) + k} * D, y{k}.to(D_PRE.dtype.element_ty), mask=d < tl.where(go, D, 0))")
            w.put(2, *(f"dw{r} += tl.where(go, c{r}, 0.0)" for r in w.R))
        else:
            w.put(2, f"{', '.join(matrix('j{i}{j}', S))} = {w.call('jacobian', u, states)}")
            w.put(2, *(f"k{j} = " + " + ".join(f"j{i}{j} * z{i}" for i in S) for j in S))
            w.put(2, *matrix("m{i}{j} = " + " + ".join(f"j{m}{{i}} * J{m}{{j}}" for m in S), S))
            w.put(2, "if HAS_RESET:", *("    " + line for line in matrix(f"m{{i}}{{j}} = tl.where(r{u} != 0, 0.0, m{{i}}{{j}})", S)))
            w.put(2, *matrix("J{i}{j} = tl.where(go, m{i}{j}, J{i}{j})", S))
        w.put(2, "if HAS_RESET:", *(f"    k{i} = tl.where(r{u} != 0, 0.0, k{i})" for i in S))
        w.put(2, *(f"g{i} = tl.where(go, k{i}, g{i})" for i in S))
    if write:
        w.put(2, f"dp -= {U * len(w.P)} * D")
    for u in range(U):
        w.put(2, *(f"x{k}_{u} = nx{k}_{u}" for k in w.P), *(f"h{i}_{u} = nh{i}_{u}" for i in S), *(f"e{i}_{u} = ne{i}_{u}" for i in S))
    w.put(2, "if HAS_RESET:", *(f"    r{u} = nr{u}" for u in range(U)))
    if write:
        w.put(1, *(f"tl.store(D_REC + ((b * n + s) * {len(w.R)} + {r}) * D + d, dw{r}, mask=inside)" for r in w.R))
        w.put(1, "if s == 0:", *(f"    tl.store(D_H0 + o0 + {i} * D, g{i}, mask=inside)" for i in S))
    else:
        w.put(1, *(f"tl.store(END + o + {i} * D, g{i}, mask=inside)" for i in S), f"oo = (b * n + s) * {n_state**2} * D + d")
        w.put(1, *matrix(f"tl.store(PROD + oo + ({{i}} * {n_state} + {{j}}) * D, J{{i}}{{j}}, mask=inside)", S))
    return w.text()


def scan_adjoint(traced: Traced) -> str:
    w = Writer(traced, 1)
    S, n_state = w.S, len(w.S)
    program(w, "scan_adjoint", "END, PROD, D_FINAL, CARRY, N, D")
    w.put(1, "b = tl.program_id(1).to(tl.int64)", f"o = (b * N + N - 1) * {n_state} * D + d", f"oo = (b * N + N - 1) * {n_state**2} * D + d")
    w.put(1, *(f"g{i} = tl.load(D_FINAL + (b * {n_state} + {i}) * D + d, mask=inside, other=0.0)" for i in S))
    w.put(1, *(f"tl.store(CARRY + o + {i} * D, g{i}, mask=inside)" for i in S))
    w.put(1, *(f"g{i} = tl.load(END + o + {i} * D, mask=inside, other=0.0)" for i in S), "for s in range(0, N - 1):")
    w.put(2, f"o -= {n_state} * D", f"oo -= {n_state**2} * D", *(f"tl.store(CARRY + o + {i} * D, g{i}, mask=inside)" for i in S))
    w.put(2, *(f"e{i} = tl.load(END + o + {i} * D, mask=inside, other=0.0)" for i in S))
    w.put(2, *matrix(f"J{{i}}{{j}} = tl.load(PROD + oo + ({{i}} * {n_state} + {{j}}) * D, mask=inside, other=0.0)", S))
    w.put(2, *(f"k{i} = e{i} + " + " + ".join(f"J{i}{j} * g{j}" for j in S) for i in S), *(f"g{i} = k{i}" for i in S))
    return w.text()


def decode(traced: Traced) -> str:
    w = Writer(traced, 1)
    program(w, "decode", "PRE, REC, H, NEW, D, sb, sp")
    w.put(1, "b = tl.program_id(1).to(tl.int64)", f"o = b * {len(w.S)} * D + d")
    w.weights()
    w.put(1, *(f"x{k}_0 = tl.load(PRE + b * sb + {k} * sp + d, mask=inside, other=0.0)" for k in w.P))
    w.put(1, *(f"h{i} = tl.load(H + o + {i} * D, mask=inside, other=0.0).to(tl.float32)" for i in w.S))
    w.put(1, f"{w.each('y{i}', w.S)} = {w.call('step', 0, w.each('h{i}', w.S))}")
    w.put(1, *(f"tl.store(NEW + o + {i} * D, y{i}.to(NEW.dtype.element_ty), mask=inside)" for i in w.S))
    return w.text()


def source(cell: Cell, unroll: int = UNROLL) -> str:
    """All kernels of a cell. Raises NotLowered if the step cannot be traced."""
    traced = trace(cell)
    arguments = [*cell.pre, *cell.rec, *cell.state]
    entries = [entry for row in traced.jacobian for entry in row]
    like = cell.state[0]
    cotangents = [f"g_{name}" for name in cell.state]
    parts = [
        HEADER.format(name=cell.name),
        function("step", arguments, traced.new, like),
        function("jacobian", arguments, entries, like),
        function("step_and_jacobian", arguments, [*traced.new, *entries], like),
        function("step_vjp", [*arguments, *cotangents], [*traced.d_pre, *traced.d_rec, *traced.d_state], like),
        forward(traced, unroll),
        correct(traced),
        backward(traced, min(unroll, UNROLL_BACK), False),
        scan_adjoint(traced),
        backward(traced, min(unroll, UNROLL_BACK), True),
        decode(traced),
    ]
    return "\n\n".join(parts)


@functools.cache
def torch_functions(cell: Cell) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """(jacobian, step_vjp) of the traced step as plain torch functions, each returning a tuple; None for a cell that cannot be traced."""
    try:
        traced = trace(cell)
    except NotLowered:
        return None
    arguments = [*cell.pre, *cell.rec, *cell.state]
    entries = [entry for row in traced.jacobian for entry in row]
    gradients = [*traced.d_pre, *traced.d_rec, *traced.d_state]
    like = cell.state[0]
    names: dict[str, Any] = {"torch": torch}
    exec(function("jacobian", arguments, entries, like, IN_TORCH), names)  # our own text, made of the operations above
    exec(function("step_vjp", [*arguments, *(f"g_{n}" for n in cell.state)], gradients, like, IN_TORCH), names)
    jacobian, step_vjp = names["jacobian"], names["step_vjp"]
    return (jacobian if len(entries) > 1 else lambda *a: (jacobian(*a),)), step_vjp


if __name__ == "__main__":
    from models.cells import load_cell

    print(source(load_cell(sys.argv[1] if len(sys.argv) > 1 else "paragru")))
