"""Traces a cell's step function into a small expression graph, differentiates it and simplifies it.

The step is called with `Node` arguments that record what is done to them (operators, and the torch functions and methods of
kernels/parallel_rnn/operations.py). Equal subexpressions are one node, so forward values, Jacobian and vector-Jacobian product share their
common parts when they are printed as code. What is recorded is all the step does, or the cell is not lowered.

Simplifications are exact, for NaN and infinity too: 0 x is not 0, x - x is not 0. Only what does not depend on an argument at all has no
derivative by it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.parallel_rnn.cell import Cell, returned
from kernels.parallel_rnn.operations import BOOLEAN, COMPARISONS, FUNCTIONS, GELU, METHODS, OPERATIONS, Kind, NotLowered, apply

__all__ = ["Graph", "Node", "NotLowered", "Traced", "order", "trace", "vjp"]
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
MOST_BRANCHES = 32


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on nodes; leaves are ("var", name) and ("const", value). Made by `make` only, which shares equal nodes."""

    op: str
    arguments: tuple[Any, ...]
    graph: Graph
    __array_ufunc__ = None  # numpy's functions would take it apart
    __hash__ = object.__hash__

    @property
    def boolean(self) -> bool:
        return self.op in BOOLEAN or self.op == "const" and isinstance(self.arguments[0], bool)

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

    def __pos__(self) -> Node:
        return self

    def __abs__(self) -> Node:
        return self.graph.make("abs", self)

    def __invert__(self) -> Node:
        return self.graph.make("not", self)

    def __pow__(self, power: Any) -> Node:
        found: Node = METHODS["pow"](self.graph, self, power)
        return found

    def __getattr__(self, name: str) -> Any:
        rule = METHODS.get(name)
        if rule is None:
            raise NotLowered(f"the tensor attribute {name!r} cannot be lowered to a kernel.")
        return lambda *args, **kwargs: apply(name, rule, self.graph, (self, *args), kwargs)

    @property
    def dtype(self) -> Kind:
        return Kind()

    def __bool__(self) -> bool:
        raise NotLowered("a step that branches on a value cannot be lowered to a kernel; torch.where can.")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Node:
        name, rule = getattr(function, "__name__", str(function)), FUNCTIONS.get(function)
        graph = next((a.graph for a in (*args, *(kwargs or {}).values()) if isinstance(a, Node)), None)
        if rule is None or graph is None:
            raise NotLowered(f"torch's {name} cannot be lowered to a kernel.")
        found: Node = apply(name, rule, graph, args, kwargs)
        return found


def _operator(op: str) -> Callable[[Node, Any], Node]:
    return lambda self, other: self.graph.make(op, self, other)


def _refused(name: str) -> Callable[..., Node]:
    def refuse(*_: Any) -> Node:
        raise NotLowered(f"Python's {name} of a value cannot be lowered to a kernel.")

    return refuse


for _name in ("and", "or", *COMPARISONS):  # == too: it is not identity
    setattr(Node, f"__{_name}__", _operator(_name))
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior", "ixor", "ifloordiv", "imod", "imatmul")
for _name in (*IN_PLACE, *"getitem setitem iter len float int index contains floordiv mod matmul rmatmul xor rpow round".split()):
    setattr(Node, f"__{_name}__", _refused(_name))


class Graph:
    """Nodes by operation and arguments, with the simplifications that derivatives need."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[Any, ...], Node] = {}

    def leaf(self, op: str, value: Any) -> Node:
        return self.nodes.setdefault((op, repr(value)), Node(op, (value,), self))  # by its text: NaN is one node, 0.0 and -0.0 are two

    def const(self, value: float | bool) -> Node:
        return self.leaf("const", value if isinstance(value, bool) else float(value))

    def number(self, value: float) -> Node:
        """A number of the step's own. Raises NotLowered for one that fp32 does not hold."""
        try:
            value = float(value)
        except OverflowError:
            value = 1e300
        if value and math.isfinite(value) and not SMALLEST <= abs(value) <= LARGEST:
            raise NotLowered(
                f"the number {value!r} is outside the range of fp32 ({SMALLEST:.1e} to {LARGEST:.1e}), in which kernels calculate."
            )
        return self.const(value)

    def make(self, op: str, *arguments: Any) -> Node:
        for a in arguments:
            if not isinstance(a, (Node, int, float)):
                raise NotLowered(f"a {type(a).__name__} inside the step cannot be lowered to a kernel; use arguments and numbers.")
        nodes = [a if isinstance(a, Node) else self.number(a) for a in arguments]
        if op in ("add", "sub", "mul") and not all(n.boolean for n in nodes):  # True is 1, as in torch
            nodes = [self.make("where", n, 1.0, 0.0) if n.boolean else n for n in nodes]
        logical = op in ("and", "or", "not")
        if any(n.boolean != (logical or op == "where" and i == 0) for i, n in enumerate(nodes)):
            raise NotLowered(f"{op} of {'numbers' if logical or op == 'where' else 'comparisons'} cannot be lowered to a kernel.")
        simpler = self.simplified(op, nodes)
        if simpler is not None:
            return simpler
        key = sorted(map(id, nodes)) if op in ("add", "mul", "and", "or") else map(id, nodes)  # a*b and b*a are one node
        return self.nodes.setdefault((op, *key), Node(op, tuple(nodes), self))

    def simplified(self, op: str, nodes: list[Node]) -> Node | None:
        """An equal node, whatever the values are, or None."""
        values = [n.arguments[0] if n.op == "const" else None for n in nodes]
        if all(v is not None for v in values):
            return self.const(folded(op, values))
        a, b = nodes[0], nodes[-1]
        va, vb = values[0], values[-1]
        if op == "neg":
            return a.arguments[0] if a.op == "neg" else None
        if op == "add":
            return (a - b.arguments[0]) if b.op == "neg" else (b - a.arguments[0]) if a.op == "neg" else None
        if op == "sub":
            return (a + b.arguments[0]) if b.op == "neg" else None
        if op == "mul":
            if va == 1 or vb == 1:
                return b if va == 1 else a
            if va == -1 or vb == -1:
                return -(b if va == -1 else a)
            return -(a.arguments[0] * b) if a.op == "neg" else -(a * b.arguments[0]) if b.op == "neg" else None
        if op == "div":
            return a if vb == 1 else None
        if op == "not":
            return a.arguments[0] if a.op == "not" else None
        if op in ("and", "or"):
            if a is b:
                return a
            known, other = (va, b) if va is not None else (vb, a)
            return None if known is None else other if known == (op == "and") else self.const(known)
        if op == "where":
            condition, yes, no = nodes
            if va is not None:
                return yes if va else no
            return yes if yes is no else self.make("where", condition.arguments[0], no, yes) if condition.op == "not" else None
        return None


def folded(op: str, values: list[Any]) -> float | bool:
    """The value of an operation on constants, in float64."""
    if op in ("and", "or", "not"):
        return not values[0] if op == "not" else all(values) if op == "and" else any(values)
    if op == "where":
        return float(values[1] if values[0] else values[2])
    names = {f"c{i}": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    result = eval(OPERATIONS[op].torch.format(*names), {"torch": torch, **names})  # our own text
    return bool(result) if op in BOOLEAN else float(result)


def partials(node: Node) -> list[tuple[Node, Node, Node | None]]:
    """(argument, d node / d argument, a condition or None) of one operation: where the condition does not hold there is no derivative at all,
    which is not the same as a product with zero. At kinks as torch has it: relu'(0) = 0, clamp'(bound) = 1, maximum shares ties."""
    g, a = node.graph, node.arguments
    one = g.const(1)
    if node.op == "add":
        return [(a[0], one, None), (a[1], one, None)]
    if node.op == "sub":
        return [(a[0], one, None), (a[1], -one, None)]
    if node.op == "mul":
        return [(a[0], a[1], None), (a[1], a[0], None)]
    if node.op == "div":
        return [(a[0], one / a[1], None), (a[1], -(node / a[1]), None)]
    if node.op == "where":
        return [(a[1], one, a[0]), (a[2], one, g.make("not", a[0]))]
    if node.op in ("maximum", "minimum"):
        below, above = ("lt", "gt") if node.op == "maximum" else ("gt", "lt")
        share = g.make("where", g.make("eq", a[0], a[1]), 0.5, 1.0)
        return [(a[0], share, g.make("not", g.make(below, a[0], a[1]))), (a[1], share, g.make("not", g.make(above, a[0], a[1])))]
    if node.op == "clamp":
        bounds = [g.make(op, a[0], b) for op, b in (("ge", a[1]), ("le", a[2])) if math.isfinite(b.arguments[0])]
        return [(a[0], one, functools.reduce(lambda p, q: g.make("and", p, q), bounds, g.const(True)))]
    if node.op == "relu":
        return [(a[0], one, g.make("not", g.make("le", a[0], 0.0)))]
    if node.op == "sign" or node.op in BOOLEAN:
        return []
    # beyond it is 0 or 1
    gate, near = (g.make("gelu_gate", a[0]), g.make("clamp", a[0], -64.0, 64.0)) if node.op == "gelu_tanh" else (one, one)
    rules: dict[str, Callable[[], Node]] = {
        "neg": lambda: -one,
        "sigmoid": lambda: node * (one - node),
        "tanh": lambda: one - node * node,
        "exp": lambda: node,
        "exp2": lambda: node * math.log(2),
        "expm1": lambda: g.make("exp", a[0]),
        "log": lambda: one / a[0],
        "log1p": lambda: one / (1.0 + a[0]),
        "sqrt": lambda: g.const(0.5) / node,
        "rsqrt": lambda: (-0.5 * node) * node * node,
        "sin": lambda: g.make("cos", a[0]),
        "cos": lambda: -g.make("sin", a[0]),
        "erf": lambda: (2 / math.sqrt(math.pi)) * g.make("exp", -(a[0] * a[0])),
        "abs": lambda: g.make("sign", a[0]),
        "softplus": lambda: g.make("sigmoid", a[0]),
        "silu": lambda: g.make("sigmoid", a[0]) + node * (one - g.make("sigmoid", a[0])),
        "gelu": lambda: g.make("normal_cdf", a[0]) + a[0] * g.make("normal_pdf", a[0]),
        "gelu_tanh": lambda: gate + node * ((one - gate) * (GELU[0] + 3 * GELU[1] * (near * near))),
        "whole_power": lambda: METHODS["pow"](g, a[0], a[1].arguments[0] - 1) * a[1],
        "power": lambda: METHODS["pow"](g, a[0], a[1].arguments[0] - 1) * a[1],
    }
    return [(a[0], rules[node.op](), None)]


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


class Adjoint:
    """The gradient of one node, by the conditions under which its terms hold. They are kept apart until the end, so that no term is multiplied
    where its condition does not hold: there the factors may be infinite."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.terms = graph, dict[frozenset[Node], Node]()

    def add(self, conditions: frozenset[Node], value: Node) -> None:
        self.terms[conditions] = self.terms[conditions] + value if conditions in self.terms else value
        if len(self.terms) > MOST_BRANCHES:
            raise NotLowered(f"more than {MOST_BRANCHES} branches meet in one value.")

    def total(self) -> Node:
        found = self._select(self.terms)
        return self.graph.const(0) if found is None else found

    def _select(self, terms: dict[frozenset[Node], Node]) -> Node | None:
        """The sum of the terms, each where its conditions hold; None of no terms."""
        first = next((c for conditions in terms for c in conditions), None)
        if first is None:
            return terms.get(frozenset())
        other = self.graph.make("not", first)
        branches = (self._select({k - {c}: v for k, v in terms.items() if c in k}) for c in (first, other))
        rest = self._select({k: v for k, v in terms.items() if first not in k and other not in k})
        chosen = self.graph.make("where", first, *(self.graph.const(0) if branch is None else branch for branch in branches))
        return chosen if rest is None else rest + chosen


def vjp(outputs: Sequence[Node], cotangents: Sequence[Node | None], inputs: Sequence[Node]) -> list[Node]:
    """Reverse mode: sum_i cotangent_i d output_i / d input_j for each input. A cotangent of None is none at all."""
    graph = inputs[0].graph
    adjoints: dict[int, Adjoint] = {}
    for output, cotangent in zip(outputs, cotangents):
        if cotangent is not None:
            adjoints.setdefault(id(output), Adjoint(graph)).add(frozenset(), cotangent)
    for node in reversed(order(outputs)):
        if id(node) not in adjoints or node.op in ("var", "const"):
            continue
        for argument, partial, condition in partials(node):
            if argument.op == "const":
                continue
            for conditions, value in adjoints[id(node)].terms.items():
                both = conditions if condition is None or condition.op == "const" else conditions | {condition}
                if condition is None or graph.make("not", condition) not in both:
                    adjoints.setdefault(id(argument), Adjoint(graph)).add(both, value * partial)
    return [adjoints[id(i)].total() if id(i) in adjoints else graph.const(0) for i in inputs]


@dataclass(frozen=True)
class Traced:
    """A step as expressions: new states, Jacobian [i][j] = d new_i / d state_j, and the gradients given cotangents. Its leaves are named by
    role and place, whatever the cell calls them: x0, x1 .. input projections, w0 .. weights, h0 .. states, g0 .. cotangents of new states."""

    cell: Cell
    new: tuple[Node, ...]
    jacobian: tuple[tuple[Node, ...], ...]
    d_pre: tuple[Node, ...]
    d_rec: tuple[Node, ...]
    d_state: tuple[Node, ...]
    linear: bool
    jumps: bool  # whether a new state may jump where an old one is changed a little
    kinks: bool  # whether its slope may

    @property
    def arguments(self) -> list[str]:
        """Names of the step's arguments, in the order pre, rec, state."""
        return names("x", self.cell.pre) + names("w", self.cell.rec) + names("h", self.cell.state)

    @property
    def fixed(self) -> list[str]:
        return names("w", self.cell.rec)

    @property
    def cotangents(self) -> list[str]:
        return names("g", self.cell.state)

    @property
    def legend(self) -> str:
        return ", ".join(f"{short} {name}" for short, name in zip(self.arguments, [*self.cell.pre, *self.cell.rec, *self.cell.state]))


def names(letter: str, given: Sequence[str]) -> list[str]:
    return [f"{letter}{i}" for i in range(len(given))]


def _recorded(cell: Cell, graph: Graph) -> tuple[Node, ...]:
    """The new states of one call of the step."""
    pre, rec, state = (
        [graph.leaf("var", n) for n in names(letter, given)] for letter, given in zip("xwh", (cell.pre, cell.rec, cell.state))
    )
    try:
        found = cell.call(pre, rec, state)
    except NotLowered:
        raise
    except Exception as reason:  # whatever a step does with values that are none
        raise NotLowered(f"its step cannot be traced ({type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}).") from None
    found = returned(cell, found)
    for new in found:
        if isinstance(new, torch.Tensor):
            raise NotLowered("it returns a tensor that does not come from its arguments.")
        if not isinstance(new, Node) or new.boolean:
            kind = "a comparison" if isinstance(new, Node) else f"a {type(new).__name__}"
            raise ValueError(f"Cell {cell.name}: a new state must be a tensor of numbers, not {kind}.")
    return found


@functools.cache
def trace(cell: Cell) -> Traced:
    """Raises NotLowered with one sentence where the step does something that has no kernel form, ValueError for one that no solver can run."""
    graph = Graph()
    try:
        new = _recorded(cell, graph)
        if any(a is not b for a, b in zip(new, _recorded(cell, graph))):
            raise NotLowered("its step does not do the same at every call.")
        one = graph.const(1)
        state = [graph.leaf("var", n) for n in names("h", cell.state)]
        rows = [vjp(new, [one if i == k else None for k in range(len(new))], state) for i in range(len(new))]
        g = [graph.leaf("var", n) for n in names("g", cell.state)]
        leaves = [graph.leaf("var", n) for n in names("x", cell.pre) + names("w", cell.rec)]
        all_d = vjp(new, g, [*leaves, *state])
    except (NotLowered, RecursionError) as reason:
        why = "its step is too long." if isinstance(reason, RecursionError) else str(reason)
        raise NotLowered(f"Cell {cell.name} runs as a loop in plain torch: {why}") from None
    used = {n.arguments[0] for n in order([entry for row in rows for entry in row]) if n.op == "var"}
    P, R = len(cell.pre), len(cell.rec)
    varying = set(map(id, state))
    for node in order(new):
        if node.op not in ("var", "const") and any(id(a) in varying for a in node.arguments):
            varying.add(id(node))
    moving = [node for node in order(new) if id(node) in varying]
    jumps = any(node.op == "sign" or node.boolean for node in moving)
    kinks = jumps or any(node.op in ("relu", "abs", "maximum", "minimum", "clamp") for node in moving)
    linear = not used & set(names("h", cell.state))
    return Traced(
        cell, new, tuple(map(tuple, rows)), tuple(all_d[:P]), tuple(all_d[P : P + R]), tuple(all_d[P + R :]), linear, jumps, kinks
    )
