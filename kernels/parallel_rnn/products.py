"""Traces a step that is dense in its heads: its products `R @ u` with matrices, and what lies between them.

A product stands for a value of its own (p0, p1 ..), so that all between products is element by element and is traced, differentiated and
printed as any step is. Products are taken in levels: those of a level only need values and products of earlier ones. The step is then

    u = operands(x, w, h, p of earlier levels),  p = R u   for each level;   new = new(x, w, h, p)

and its gradient, from cotangents g of the new states, the same way back: for each level d_product(.., g, q of later levels), q = R^T d_product,
and at last d_pre, d_rec and d_state of all of g and q. The Jacobian is its diagonal part: products count as constant in it.
"""

from __future__ import annotations

import collections
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from kernels.parallel_rnn.differentiate import vjp
from kernels.parallel_rnn.expressions import compare, function
from kernels.parallel_rnn.graph import Graph, Node, order
from kernels.parallel_rnn.operations import NotLowered
from kernels.parallel_rnn.step import HeadMatrix, StepFunction
from kernels.parallel_rnn.trace import names, recorded

Values = Sequence[Any]


class Product(NamedTuple):
    """R[matrix] @ operands[operand]."""

    matrix: int
    operand: int


@dataclass
class _Products:
    """What a step multiplies with its matrices, as it is recorded."""

    graph: Graph
    operands: list[Node] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)


class _Matrix:
    """Stands for a matrix while a step is traced."""

    def __init__(self, index: int, seen: _Products) -> None:
        self.index, self.seen = index, seen

    def __matmul__(self, x: Any) -> Node:
        if not isinstance(x, Node) or x.boolean:
            raise NotLowered("a matrix is multiplied with a value that does not come from the step's arguments.")
        operands, products = self.seen.operands, self.seen.products
        place = next((i for i, operand in enumerate(operands) if operand is x), len(operands))
        if place == len(operands):
            operands.append(x)
        product = Product(self.index, place)
        if product not in products:
            products.append(product)
        return self.seen.graph.leaf("var", f"p{products.index(product)}")

    def __getattr__(self, name: str) -> Any:
        raise NotLowered("a matrix is used in another way than `R @ h`.")


def is_leaf(value: Any, name: str) -> bool:
    """Whether an argument of a node is the variable of this name."""
    return isinstance(value, Node) and value.op == "var" and value.arguments == (name,)


@dataclass(frozen=True)
class Dense:
    """A step with products as expressions over its leaves: x, w, h as in trace.py, p products; g cotangents of new states, q of operands."""

    cell: StepFunction
    operands: tuple[Node, ...]
    products: tuple[Product, ...]
    levels: tuple[tuple[int, ...], ...]  # operands by level
    new: tuple[Node, ...]
    jacobian: tuple[tuple[Node, ...], ...]
    d_product: tuple[Node, ...]
    d_pre: tuple[Node, ...]
    d_rec: tuple[Node, ...]
    d_state: tuple[Node, ...]

    @property
    def arguments(self) -> list[str]:
        cell = self.cell
        return names("x", cell.pre) + names("w", cell.rec) + names("h", cell.state) + names("p", self.products)  # type: ignore[arg-type]

    @property
    def cotangents(self) -> list[str]:
        return names("g", self.cell.state) + names("q", self.operands)  # type: ignore[arg-type]

    def of_level(self, level: int) -> list[int]:
        """The products of a level."""
        return [i for i, product in enumerate(self.products) if product.operand in self.levels[level]]

    @property
    def begun(self) -> dict[int, tuple[str, Node]]:
        """Products that enter as a + p alone, with one sum a of an input and weights, so that they may begin from it: (a as text, the node a + p)."""
        entries = [entry for row in self.jacobian for entry in row]
        results = [*self.operands, *self.new, *entries, *self.d_product, *self.d_pre, *self.d_rec, *self.d_state]
        nodes = order(results)
        found = dict[int, tuple[str, Node]]()
        for i in range(len(self.products)):
            users = [node for node in nodes if any(is_leaf(a, f"p{i}") for a in node.arguments)]
            if len(users) != 1 or users[0].op != "add" or any(is_leaf(result, f"p{i}") for result in results):
                continue
            a, b = users[0].arguments
            rest = order([a if is_leaf(b, f"p{i}") else b])
            leaves = [node.arguments[0] for node in rest if node.op == "var"]
            is_sum = all(node.op in ("var", "add") for node in rest) and len(rest) == 2 * len(leaves) - 1  # which has each of them once
            if is_sum and {leaf[0] for leaf in leaves} in ({"x"}, {"x", "w"}):
                found[i] = " + ".join(sorted(leaves, key=lambda leaf: leaf[0] != "x")), users[0]
        return found

    @property
    def carried(self) -> list[tuple[int, int]]:
        """The entries of a product of Jacobians over several steps that are not zero whatever the values are."""
        S = range(len(self.new))
        filled = {(i, j) for i in S for j in S if not (self.jacobian[i][j].op == "const" and self.jacobian[i][j].arguments[0] == 0)}
        product = filled
        for _ in S:
            product = product | {(i, j) for i in S for j in S if any((i, m) in filled and (m, j) in product for m in S)}
        return sorted(product)


@functools.cache
def trace_dense(cell: StepFunction) -> Dense:
    """Raises NotLowered with one sentence where the step does something that has no kernel form, ValueError for one that no solver can run."""
    graph = Graph()
    seen = _Products(graph)
    mat = [_Matrix(i, seen) for i in range(len(cell.mat))]
    try:
        new = recorded(cell, graph, mat)
        if any(a is not b for a, b in zip(new, recorded(cell, graph, mat))):
            raise NotLowered("its step does not do the same at every call.")
        if {product.matrix for product in seen.products} != set(range(len(mat))):
            raise NotLowered("it has a matrix that it does not multiply with anything.")
        return _differentiated(cell, graph, new, tuple(seen.operands), tuple(seen.products))
    except (NotLowered, RecursionError) as reason:
        why = "its step is too long." if isinstance(reason, RecursionError) else str(reason)
        raise NotLowered(f"Cell {cell.name} runs as a loop in plain torch: {why}") from None


class Apart(NamedTuple):
    """A step's adjoint (d_product, d_pre, d_rec and d_state of a `Dense`) as expressions over cotangents, weights and what is known before there are
    cotangents: known, expressions over inputs, states and products."""

    known: tuple[Node, ...]
    d_product: tuple[Node, ...]
    rest: tuple[Node, ...]


@functools.cache
def apart(dense: Dense) -> Apart:
    """Factors that are known are multiplied with one another first, so that few values have to be kept."""
    results = [*dense.d_product, *dense.d_pre, *dense.d_rec, *dense.d_state]
    nodes, late = order(results), set[Node]()
    uses = collections.Counter(results)
    for node in nodes:  # arguments first
        given = [a for a in node.arguments if isinstance(a, Node)]
        uses.update(given)
        if node.op == "var" and node.arguments[0][0] in "gq" or any(a in late for a in given):
            late.add(node)

    def factors(node: Node) -> list[Node]:
        return [f for a in node.arguments for f in (factors(a) if a in late and a.op == "mul" and uses[a] == 1 else [a])]

    made = dict[Node, Node]()
    for node in nodes:
        if node not in late or node.op == "var":
            made[node] = node
        elif node.op == "mul":
            parts = factors(node)
            groups = [[made[f] for f in parts if f in late], [f for f in parts if f not in late]]
            made[node] = functools.reduce(operator.mul, [functools.reduce(operator.mul, group) for group in groups if group])
        else:
            made[node] = node.graph.make(node.op, *(made[a] if isinstance(a, Node) else a for a in node.arguments))
    found = [made[node] for node in results]
    late |= {made[node] for node in late}
    wanted = {a for node in order(found) if node in late for a in node.arguments if isinstance(a, Node)} | set(found)
    known = [
        a for a in order(found) if a in wanted and a not in late and a.op != "const" and not (a.op == "var" and a.arguments[0][0] == "w")
    ]
    Q = len(dense.products)
    return Apart(tuple(known), tuple(found[:Q]), tuple(found[Q:]))


def _differentiated(
    cell: StepFunction, graph: Graph, new: tuple[Node, ...], operands: tuple[Node, ...], products: tuple[Product, ...]
) -> Dense:
    def leaves(letter: str, given: Sequence[Any]) -> list[Node]:
        return [graph.leaf("var", f"{letter}{i}") for i in range(len(given))]

    x, w, h, p = leaves("x", cell.pre), leaves("w", cell.rec), leaves("h", cell.state), leaves("p", products)
    g, q = leaves("g", cell.state), leaves("q", operands)
    one, S = graph.const(1), len(cell.state)
    rows = tuple(tuple(vjp(new, [one if i == k else None for k in range(S)], h)) for i in range(S))
    found = vjp([*new, *operands], [*g, *q], [*p, *x, *w, *h])
    parts, at = list[tuple[Node, ...]](), 0
    for group in (p, x, w, h):
        parts.append(tuple(found[at : at + len(group)]))
        at += len(group)
    return Dense(cell, operands, products, _levels(operands, products), new, rows, *parts)


def _levels(operands: tuple[Node, ...], products: tuple[Product, ...]) -> tuple[tuple[int, ...], ...]:
    level: dict[int, int] = {}
    for i, operand in enumerate(operands):  # as they were recorded, so that what an operand needs comes before it
        needed = [n.arguments[0] for n in order([operand]) if n.op == "var" and n.arguments[0][0] == "p"]
        level[i] = max((level[products[int(name[1:])].operand] + 1 for name in needed), default=0)
    return tuple(tuple(i for i in level if level[i] == l) for l in range(max(level.values()) + 1))


def _function(name: str, arguments: Sequence[str], results: Sequence[Node]) -> str:
    """A plain torch function that returns a tuple."""
    text = function(name, arguments, results, "h0", triton=False)
    head, result = text.rstrip().rsplit("    return ", 1)
    return f"{head}    return ({result},)\n" if len(results) == 1 else text


class InTorch:
    """The parts of a step as plain torch functions, each from and to lists of tensors (..., D)."""

    def __init__(self, dense: Dense) -> None:
        self.dense, cell = dense, dense.cell
        made: dict[str, Any] = {"torch": torch}
        arguments, both = dense.arguments, [*dense.arguments, *dense.cotangents]
        for l, level in enumerate(dense.levels):
            exec(_function(f"operands{l}", arguments, [dense.operands[i] for i in level]), made)  # our own text, as in expressions.py
            exec(_function(f"d_products{l}", both, [dense.d_product[i] for i in dense.of_level(l)]), made)
        exec(_function("new", arguments, dense.new), made)
        exec(_function("jacobian", arguments, [entry for row in dense.jacobian for entry in row]), made)
        exec(_function("gradients", both, [*dense.d_pre, *dense.d_rec, *dense.d_state]), made)
        self._made, self.P, self.R, self.S = made, len(cell.pre), len(cell.rec), len(cell.state)

    def _call(self, name: str, state: Values, *given: Values) -> list[Any]:
        return [value.expand_as(state[0]) for value in self._made[name](*(v for values in given for v in values))]

    def products(self, x: Values, w: Values, h: Values, mat: Sequence[HeadMatrix]) -> tuple[list[Any], list[Any]]:
        """(all products, all operands)."""
        p: list[Any] = [None] * len(self.dense.products)
        u: list[Any] = [None] * len(self.dense.operands)
        for l, level in enumerate(self.dense.levels):
            for i, value in zip(level, self._call(f"operands{l}", h, x, w, h, p)):
                u[i] = value
            for i in self.dense.of_level(l):
                p[i] = mat[self.dense.products[i].matrix] @ u[self.dense.products[i].operand]
        return p, u

    def step(self, x: Values, w: Values, h: Values, mat: Sequence[HeadMatrix]) -> list[Any]:
        return self._call("new", h, x, w, h, self.products(x, w, h, mat)[0])

    def jacobian(self, x: Values, w: Values, h: Values, p: Values) -> list[Any]:
        """d new_i / d h_j with products held constant, row by row."""
        return self._call("jacobian", h, x, w, h, p)

    def d_products(self, x: Values, w: Values, h: Values, p: Values, g: Values, transposed: Sequence[HeadMatrix]) -> tuple[list[Any], ...]:
        """(cotangents of the products, of the operands) of those g of the new states."""
        d_p: list[Any] = [None] * len(self.dense.products)
        q: list[Any] = [None] * len(self.dense.operands)
        for l in reversed(range(len(self.dense.levels))):
            for i, value in zip(self.dense.of_level(l), self._call(f"d_products{l}", h, x, w, h, p, g, q)):
                d_p[i] = value
                matrix, operand = self.dense.products[i]
                term = transposed[matrix] @ value
                q[operand] = term if q[operand] is None else q[operand] + term
        return d_p, q

    def gradients(self, x: Values, w: Values, h: Values, p: Values, g: Values, q: Values) -> tuple[list[Any], list[Any], list[Any]]:
        """Those of pre, of rec (not summed over steps), and of the states before the step."""
        found = self._call("gradients", h, x, w, h, p, g, q)
        return found[: self.P], found[self.P : self.P + self.R], found[self.P + self.R :]


@functools.cache
def in_torch(cell: StepFunction) -> InTorch:
    """Raises NotLowered."""
    return InTorch(trace_dense(cell))


def check(cell: StepFunction) -> None:
    """Raises NotLowered unless the step can be traced and does to tensors what was traced, ValueError for a step that no solver can run."""
    made = in_torch(cell)
    x, w, h = ([3 * torch.randn(64, dtype=torch.float64) for _ in role] for role in (cell.pre, cell.rec, cell.state))
    mat = [HeadMatrix(torch.randn(4, 16, 16, dtype=torch.float64)) for _ in cell.mat]
    try:
        new = cell(x, w, h, mat)
    except Exception:  # models say it in a sentence (Cell.problem), and a call of the step says it itself
        return
    compare(cell, new, made.step(x, w, h, mat))


def transposed(mat: Sequence[HeadMatrix]) -> list[HeadMatrix]:
    return [HeadMatrix(m.R_EKJ.transpose(1, 2)) for m in mat]


__all__ = ["Dense", "HeadMatrix", "InTorch", "Product", "check", "in_torch", "trace_dense", "transposed"]
