"""The expression graph that a traced step is recorded in: nodes, and the simplifications that derivatives need.

Equal subexpressions are one node. Simplifications are exact, for NaN and infinity too: 0 x is not 0, x - x is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.parallel_rnn.operations import BOOLEAN, COMPARISONS, FUNCTIONS, METHODS, OPERATIONS, Kind, NotLowered, apply

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


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
        node: Node = METHODS["pow"](self.graph, self, power)
        return node

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
        node: Node = apply(name, rule, graph, args, kwargs)
        return node


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


def order(roots: Sequence[Node], known: Container[Node] = ()) -> list[Node]:
    """All nodes under the roots, arguments first; nothing under those that are known."""
    seen: dict[int, Node] = {}

    def visit(node: Node) -> None:
        if id(node) in seen:
            return
        if node.op not in ("var", "const") and node not in known:
            for argument in node.arguments:
                visit(argument)
        seen[id(node)] = node

    for root in roots:
        visit(root)
    return list(seen.values())
