"""Traces a cell's step function into a small expression graph, differentiates it and simplifies it.

The step is called with `Node` arguments that record what is done to them (operators, and the torch functions and methods of
kernels/parallel_rnn/operations.py). Forward values, Jacobian and vector-Jacobian product share their common parts (kernels/parallel_rnn/graph.py,
differentiate.py) when they are printed as code. What is recorded is all the step does, or the cell is not lowered.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.parallel_rnn.differentiate import jacobian_rows, vjp
from kernels.parallel_rnn.graph import Graph, Node, order
from kernels.parallel_rnn.operations import NotLowered
from kernels.parallel_rnn.step import StepFunction, returned

MOST_CURVED = 1  # states up to which second derivatives are made: of ParaLSTM's two they cost a walk 13 %, and one correction does without

__all__ = ["Graph", "NotLowered", "Traced", "trace", "vjp"]


@dataclass(frozen=True)
class Traced:
    """A step as expressions: new states, Jacobian [i][j] = d new_i / d state_j, and the gradients given cotangents. Its leaves are named by
    role and place, whatever the cell calls them: x0, x1 .. input projections, w0 .. weights, h0 .. states, g0 .. cotangents of new states."""

    cell: StepFunction
    new: tuple[Node, ...]
    jacobian: tuple[tuple[Node, ...], ...]
    d_pre: tuple[Node, ...]
    d_rec: tuple[Node, ...]
    d_state: tuple[Node, ...]
    second: tuple[
        tuple[tuple[Node, ...], ...], ...
    ]  # [i][j][k <= j] = d^2 new_i / d state_j d state_k; empty where `curves` does not ask for it
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


def recorded(cell: StepFunction, graph: Graph, mat: Sequence[Any] = ()) -> tuple[Node, ...]:
    """The new states of one call of the step. mat: what stands for its matrices (products.py)."""
    pre, rec, state = (
        [graph.leaf("var", n) for n in names(letter, given)] for letter, given in zip("xwh", (cell.pre, cell.rec, cell.state))
    )
    try:
        made = cell.call(pre, rec, state, mat)
    except NotLowered:
        raise
    except Exception as reason:  # whatever a step does with values that are none
        raise NotLowered(f"its step cannot be traced ({type(reason).__name__}: {(str(reason).splitlines() or [''])[0]}).") from None
    made = returned(cell, made)
    for new in made:
        if isinstance(new, torch.Tensor):
            raise NotLowered("it returns a tensor that does not come from its arguments.")
        if not isinstance(new, Node) or new.boolean:
            kind = "a comparison" if isinstance(new, Node) else f"a {type(new).__name__}"
            raise ValueError(f"Cell {cell.name}: a new state must be a tensor of numbers, not {kind}.")
    return made


def _second(rows: Sequence[Sequence[Node]], state: Sequence[Node]) -> tuple[tuple[tuple[Node, ...], ...], ...]:
    """The derivatives of the Jacobian's rows, [i][j][k <= j]; none where some function has none: a solve does without."""
    one = state[0].graph.const(1)
    try:
        return tuple(tuple(tuple(vjp([entry], [one], state)[: j + 1]) for j, entry in enumerate(row)) for row in rows)
    except (NotLowered, RecursionError):
        return ()


@functools.cache
def trace(cell: StepFunction) -> Traced:
    """Raises NotLowered with one sentence where the step does something that has no kernel form, ValueError for one that no solver can run."""
    graph = Graph()
    try:
        new = recorded(cell, graph)
        if any(a is not b for a, b in zip(new, recorded(cell, graph))):
            raise NotLowered("its step does not do the same at every call.")
        state = [graph.leaf("var", n) for n in names("h", cell.state)]
        rows = jacobian_rows(new, state)
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
    second = _second(rows, state) if len(state) <= MOST_CURVED and not kinks and not linear else ()
    return Traced(
        cell, new, tuple(map(tuple, rows)), tuple(all_d[:P]), tuple(all_d[P : P + R]), tuple(all_d[P + R :]), second, linear, jumps, kinks
    )
