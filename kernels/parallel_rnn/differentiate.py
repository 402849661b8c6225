"""Reverse mode on expression graphs: the derivatives of each operation, and the vector-Jacobian product of several nodes.

Only what does not depend on an argument at all has no derivative by it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from kernels.parallel_rnn.graph import Graph, Node, order
from kernels.parallel_rnn.operations import BOOLEAN, GELU, METHODS, NotLowered

MOST_BRANCHES = 32


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
        "normal_cdf": lambda: g.make("normal_pdf", a[0]),
        "normal_pdf": lambda: -(a[0] * node),
        "whole_power": lambda: METHODS["pow"](g, a[0], a[1].arguments[0] - 1) * a[1],
        "power": lambda: METHODS["pow"](g, a[0], a[1].arguments[0] - 1) * a[1],
    }
    if node.op not in rules:
        raise NotLowered(f"{node.op} has no derivative here.")
    return [(a[0], rules[node.op](), None)]


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
        total = self._select(self.terms)
        return self.graph.const(0) if total is None else total

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


def vjp(outputs: Sequence[Node], cotangents: Sequence[Node | None], inputs: Sequence[Node], given: Sequence[Node] = ()) -> list[Node]:
    """Reverse mode: sum_i cotangent_i d output_i / d input_j for each input. A cotangent of None is none at all. given: nodes that count as leaves."""
    graph = inputs[0].graph
    adjoints: dict[int, Adjoint] = {}
    for output, cotangent in zip(outputs, cotangents):
        if cotangent is not None:
            adjoints.setdefault(id(output), Adjoint(graph)).add(frozenset(), cotangent)
    leaves = set(map(id, given))
    for node in reversed(order(outputs)):
        if id(node) not in adjoints or node.op in ("var", "const") or id(node) in leaves:
            continue
        for argument, partial, condition in partials(node):
            if argument.op == "const":
                continue
            for conditions, value in adjoints[id(node)].terms.items():
                both = conditions if condition is None or condition.op == "const" else conditions | {condition}
                if condition is None or graph.make("not", condition) not in both:
                    adjoints.setdefault(id(argument), Adjoint(graph)).add(both, value * partial)
    return [adjoints[id(i)].total() if id(i) in adjoints else graph.const(0) for i in inputs]


def jacobian_rows(outputs: Sequence[Node], inputs: Sequence[Node]) -> list[list[Node]]:
    """Rows of d output_i / d input_j. An output that others are made of is differentiated once: their rows go through its row, unless a condition
    anywhere says that some derivative is not to be multiplied with."""
    one, rows = inputs[0].graph.const(1), dict[int, list[Node]]()
    nodes = {id(node): node for node in order(outputs) if node.op not in ("var", "const")}
    smooth = all(condition is None for node in nodes.values() for _, _, condition in partials(node))

    def row(output: Node) -> list[Node]:
        if id(output) not in rows:
            under = {id(node) for node in order([output])} - {id(output)}
            through = [other for other in {id(o): o for o in outputs}.values() if smooth and id(other) in under & nodes.keys()]
            by = vjp([output], [one], [*through, *inputs], through)
            made = by[len(through) :]
            for factor, other in zip(by, through):
                if factor.op != "const" or factor.arguments[0] != 0:  # else it is made of it through another output
                    terms = [None if entry.op == "const" and entry.arguments[0] == 0 else factor * entry for entry in row(other)]
                    made = [a if b is None else b if a.op == "const" and a.arguments[0] == 0 else a + b for a, b in zip(made, terms)]
            rows[id(output)] = made
        return rows[id(output)]

    return [row(output) for output in outputs]
