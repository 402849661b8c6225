"""Traces a cell's step function into a small expression graph, differentiates it and simplifies it.

The step is called once with `Node` arguments that record what is done to them (operators and the torch functions in FUNCTIONS). Equal
subexpressions are one node, so forward values, Jacobian and vector-Jacobian product share their common parts when they are printed as code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.parallel_rnn.cell import Cell


class NotLowered(Exception):
    """A cell does something that cannot be turned into a kernel; the message says what, in one sentence."""


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on nodes; leaves are ("var", name) and ("const", value). Made by `make` only, which shares equal nodes."""

    op: str
    arguments: tuple[Any, ...]
    graph: Graph

    def __add__(self, other: Any) -> Node:
        return self.graph.make("add", self, other)

    def __sub__(self, other: Any) -> Node:
        return self.graph.make("sub", self, other)

    def __mul__(self, other: Any) -> Node:
        return self.graph.make("mul", self, other)

    def __truediv__(self, other: Any) -> Node:
        return self.graph.make("div", self, other)

    def __radd__(self, other: Any) -> Node:
        return self.graph.make("add", other, self)

    def __rsub__(self, other: Any) -> Node:
        return self.graph.make("sub", other, self)

    def __rmul__(self, other: Any) -> Node:
        return self.graph.make("mul", other, self)

    def __rtruediv__(self, other: Any) -> Node:
        return self.graph.make("div", other, self)

    def __neg__(self) -> Node:
        return self.graph.make("neg", self)

    def __pow__(self, power: Any) -> Node:
        if not isinstance(power, int) or not 1 <= power <= 8:
            raise NotLowered(f"only whole powers from 1 to 8 can be lowered, not {power!r}.")
        return functools.reduce(lambda a, b: a * b, [self] * power)

    def __getattr__(self, name: str) -> Any:
        if name in UNARY:
            return lambda: self.graph.make(name, self)
        raise NotLowered(f"the tensor attribute {name!r} cannot be lowered to a kernel.")

    def __bool__(self) -> bool:
        raise NotLowered("a step that branches on a value cannot be lowered to a kernel.")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Node:
        name = FUNCTIONS.get(function)
        if name is None or kwargs:
            extra = f" with {', '.join(kwargs)}" if kwargs else ""
            raise NotLowered(f"torch.{getattr(function, '__name__', function)}{extra} cannot be lowered to a kernel.")
        graph = next(a.graph for a in args if isinstance(a, Node))
        return graph.make(name, *args)


UNARY = ("sigmoid", "tanh", "exp", "log", "relu", "softplus", "neg", "positive", "sqrt")
FUNCTIONS: dict[Any, str] = {
    torch.sigmoid: "sigmoid", torch.tanh: "tanh", torch.exp: "exp", torch.log: "log", torch.relu: "relu", torch.neg: "neg", torch.sqrt: "sqrt",
    torch.nn.functional.softplus: "softplus", torch.nn.functional.sigmoid: "sigmoid", torch.nn.functional.tanh: "tanh",
    torch.nn.functional.relu: "relu", torch.add: "add", torch.sub: "sub", torch.mul: "mul", torch.div: "div", torch.true_divide: "div",
}  # fmt: skip


class Graph:
    """Nodes by operation and arguments, with the simplifications that derivatives need."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[Any, ...], Node] = {}

    def leaf(self, op: str, value: Any) -> Node:
        return self.nodes.setdefault((op, value), Node(op, (value,), self))

    def const(self, value: float) -> Node:
        return self.leaf("const", float(value))

    def make(self, op: str, *arguments: Any) -> Node:
        for a in arguments:
            if not isinstance(a, (Node, int, float)):
                raise NotLowered(f"a {type(a).__name__} inside the step cannot be lowered to a kernel; use arguments and numbers.")
        nodes = [a if isinstance(a, Node) else self.const(a) for a in arguments]
        simpler = self.simplified(op, nodes)
        if simpler is not None:
            return simpler
        key = sorted(map(id, nodes)) if op in ("add", "mul") else map(id, nodes)  # a*b and b*a are one node
        return self.nodes.setdefault((op, *key), Node(op, tuple(nodes), self))

    def simplified(self, op: str, nodes: list[Node]) -> Node | None:
        values = [n.arguments[0] if n.op == "const" else None for n in nodes]
        a, b = nodes[0], nodes[-1]
        va, vb = values[0], values[-1]
        if op in ARITHMETIC and va is not None and vb is not None:
            return self.const(ARITHMETIC[op](va, vb))
        if op in EVALUATE and va is not None:
            return self.const(float(EVALUATE[op](torch.tensor(va, dtype=torch.float64))))
        if op == "neg":
            return self.const(-va) if va is not None else (a.arguments[0] if a.op == "neg" else None)
        if op == "add":
            return b if va == 0 else a if vb == 0 else (a - b.arguments[0]) if b.op == "neg" else (b - a.arguments[0]) if a.op == "neg" else None
        if op == "sub":
            return a if vb == 0 else -b if va == 0 else self.const(0) if a is b else (a + b.arguments[0]) if b.op == "neg" else None
        if op == "mul":
            if va == 0 or vb == 0:
                return self.const(0)
            if va == 1 or vb == 1:
                return b if va == 1 else a
            if va == -1 or vb == -1:
                return -(b if va == -1 else a)
            return -(a.arguments[0] * b) if a.op == "neg" else -(a * b.arguments[0]) if b.op == "neg" else None
        if op == "div":
            return self.const(0) if va == 0 else a if vb == 1 else None
        return a if op == "positive" else None


ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b
}  # fmt: skip


EVALUATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt, "relu": torch.relu,
    "softplus": torch.nn.functional.softplus, "positive_mask": lambda x: (x > 0).double(),
}  # fmt: skip


def partials(node: Node) -> list[tuple[Node, Node]]:
    """(argument, d node / d argument) of one operation."""
    g, a = node.graph, node.arguments
    one = g.const(1)
    if node.op == "add":
        return [(a[0], one), (a[1], one)]
    if node.op == "sub":
        return [(a[0], one), (a[1], -one)]
    if node.op == "mul":
        return [(a[0], a[1]), (a[1], a[0])]
    if node.op == "div":
        return [(a[0], one / a[1]), (a[1], -(node / a[1]))]
    rules: dict[str, Callable[[], Node]] = {
        "neg": lambda: -one,
        "sigmoid": lambda: node * (one - node),
        "tanh": lambda: one - node * node,
        "exp": lambda: node,
        "log": lambda: one / a[0],
        "sqrt": lambda: g.const(0.5) / node,
        "relu": lambda: g.make("positive_mask", a[0]),
        "softplus": lambda: g.make("sigmoid", a[0]),
        "positive_mask": lambda: g.const(0),
    }
    return [(a[0], rules[node.op]())]


def order(roots: Sequence[Node]) -> list[Node]:
    """All nodes under the roots, arguments first."""
    seen: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) in seen:
            return
        if node.op not in ("var", "const"):
            for argument in node.arguments:
                visit(argument)
        seen[id(node)] = node

    for root in roots:
        visit(root)
    return list(seen.values())


def vjp(outputs: Sequence[Node], cotangents: Sequence[Node], inputs: Sequence[Node]) -> list[Node]:
    """Reverse mode: sum_i cotangent_i d output_i / d input_j for each input."""
    graph = inputs[0].graph
    total: dict[int, Node] = {}
    nodes = order(outputs)
    for output, cotangent in zip(outputs, cotangents):
        total[id(output)] = total[id(output)] + cotangent if id(output) in total else cotangent
    for node in reversed(nodes):
        if id(node) not in total or node.op in ("var", "const"):
            continue
        for argument, partial in partials(node):
            if argument.op != "const":
                term = total[id(node)] * partial
                total[id(argument)] = total[id(argument)] + term if id(argument) in total else term
    return [total.get(id(i), graph.const(0)) for i in inputs]


@dataclass(frozen=True)
class Traced:
    """A step as expressions: new states, Jacobian [i][j] = d new_i / d state_j, and the gradients given cotangents named g_<state>."""

    cell: Cell
    new: tuple[Node, ...]
    jacobian: tuple[tuple[Node, ...], ...]
    d_pre: tuple[Node, ...]
    d_rec: tuple[Node, ...]
    d_state: tuple[Node, ...]
    linear: bool


@functools.cache
def trace(cell: Cell) -> Traced:
    """Raises NotLowered with one sentence where the step does something that has no kernel form."""
    graph = Graph()
    pre, rec, state = ([graph.leaf("var", name) for name in names] for names in (cell.pre, cell.rec, cell.state))
    try:
        found = cell(pre, rec, state)
    except NotLowered as reason:
        raise NotLowered(f"Cell {cell.name} runs on the reference: {reason}") from None
    except (TypeError, RuntimeError, AttributeError) as reason:
        raise NotLowered(f"Cell {cell.name} runs on the reference: its step cannot be traced ({str(reason).splitlines()[0]}).") from None
    if not isinstance(found, (tuple, list)) or len(found) != len(cell.state):
        raise NotLowered(f"Cell {cell.name} runs on the reference: its step must return a tuple of {len(cell.state)} states.")
    new = tuple(graph.make("add", n, 0.0) for n in found)
    one, zero = graph.const(1), graph.const(0)
    rows = [vjp(new, [one if i == k else zero for k in range(len(new))], state) for i in range(len(new))]
    g = [graph.leaf("var", f"g_{name}") for name in cell.state]
    all_d = vjp(new, g, [*pre, *rec, *state])
    names = {n.arguments[0] for n in order([entry for row in rows for entry in row]) if n.op == "var"}
    P, R = len(pre), len(rec)
    return Traced(
        cell, new, tuple(map(tuple, rows)), tuple(all_d[:P]), tuple(all_d[P : P + R]), tuple(all_d[P + R :]), not names & set(cell.state)
    )
