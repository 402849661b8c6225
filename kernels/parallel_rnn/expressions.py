"""Prints traced expressions as functions: in Triton for the kernels, in torch for the plain solvers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.parallel_rnn.graph import LARGEST, SMALLEST, Node, order
from kernels.parallel_rnn.operations import OPERATIONS, TENSORS_ONLY, NotLowered
from kernels.parallel_rnn.step import StepFunction
from kernels.parallel_rnn.trace import Traced, trace

LOG2_E = 1.4426950408889634
# Through powers of two of a scaled argument. Where a step waits for the step before, `scaled` moves the factor to inputs and weights.
POWERS = {"sigmoid": ("_logistic({})", -LOG2_E), "tanh": ("_scaled_tanh({})", -2 * LOG2_E), "exp": ("_exp2({})", LOG2_E)}


def bare(text: str) -> str:
    """Without one pair of outer brackets, where they enclose the whole."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and i < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text


def literal(value: float | bool, triton: bool) -> str:
    """A constant as text. Kernels calculate in fp32, where a number it does not hold is infinite or zero (a step has none, its derivatives may)."""
    if isinstance(value, bool):
        return repr(value)
    if triton and math.isfinite(value) and value and not SMALLEST <= abs(value) <= LARGEST:
        value = math.copysign(math.inf if abs(value) > 1 else 0.0, value)
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def scaled(node: Node, factor: float, written: Callable[[Node], str], fixed: Sequence[str]) -> str:
    """`node` times a number, by its terms. `written`: the text of a node, a name if it is shared; `fixed`: names that stay the same in all steps."""
    text = written(node)
    if node.op in ("add", "sub") and text.startswith("("):
        return " ".join(
            (
                scaled(node.arguments[0], factor, written, fixed),
                "+-"[node.op == "sub"],
                f"({scaled(node.arguments[1], factor, written, fixed)})",
            )
        )
    if node.op == "mul" and text.startswith("("):
        for one, other in (node.arguments, node.arguments[::-1]):
            if one.op == "var" and one.arguments[0] in fixed:
                return f"({factor!r} * {written(one)}) * {written(other)}"
    return f"{factor!r} * {text}"


def function(
    name: str,
    arguments: Sequence[str],
    results: Sequence[Node],
    like: str,
    triton: bool = True,
    fixed: Sequence[str] = (),
    legend: str = "",
    given: dict[Node, str] | None = None,
) -> str:
    """A function (jitted, if in Triton) of the expressions; values used once are written in place, shared ones get a line. Constants
    become tensors shaped as `like`. fixed: arguments that are the same at every step, of a function on whose latency a loop depends. given: names
    of expressions that come as arguments."""
    known = given or {}
    nodes = order(results, known)
    beside = {node.arguments[0] for node in nodes if node.op == "softplus"}
    uses: dict[int, int] = {}
    for node in nodes:
        for argument in node.arguments if node.op not in ("var", "const") and node not in known else ():
            uses[id(argument)] = uses.get(id(argument), 0) + 1
    for node in results:
        uses[id(node)] = uses.get(id(node), 0) + 1
    text: dict[int, str] = {}
    lines = [("@triton.jit\n" if triton else "") + f"def {name}({', '.join(arguments)}):" + (f"  # {legend}" if legend else "")]
    shared = 0
    for node in nodes:
        if node in known:
            text[id(node)] = known[node]
            continue
        if node.op in ("var", "const"):
            text[id(node)] = node.arguments[0] if node.op == "var" else literal(node.arguments[0], triton)
            continue
        if triton and fixed and node.op in POWERS:
            power, factor = POWERS[node.op]
            form = power.format(scaled(node.arguments[0], factor, lambda n: text[id(n)], fixed))
        else:
            values = [text[id(a)] for a in node.arguments]
            if not triton and node.op in TENSORS_ONLY:
                values = [f"torch.full_like({like}, {t})" if a.op == "const" else t for a, t in zip(node.arguments, values)]
            form = (OPERATIONS[node.op].triton if triton else OPERATIONS[node.op].torch).format(*values)
            if triton and node.op == "sigmoid" and node.arguments[0] in beside:
                form = f"_sigmoid_beside_softplus({values[0]})"
        if uses.get(id(node), 0) > 1 or len(form) > 90:
            shared += 1
            text[id(node)] = f"v{shared}_"
            lines.append(f"    v{shared}_ = {bare(form)}")
        else:
            text[id(node)] = form
    out = []
    for node in results:
        # else it has the shape of a weight, or none
        varies = any(leaf.op == "var" and leaf.arguments[0][0] != "w" for leaf in order([node]))
        flat = node.op == "const" or triton and not varies
        out.append(f"{'tl' if triton else 'torch'}.zeros_like({like}) + {text[id(node)]}" if flat else bare(text[id(node)]))
    return "\n".join([*lines, f"    return {', '.join(out)}"]) + "\n"


def derivatives(traced: Traced, jacobian: str = "jacobian", gradients: str = "step_vjp") -> tuple[str, str]:
    """(jacobian, step_vjp) of the traced step as the text of plain torch functions of these names, each returning a tuple."""
    entries, like = [entry for row in traced.jacobian for entry in row], "h0"
    text = function(jacobian, traced.arguments, entries, like, triton=False, legend=traced.legend)
    if len(entries) == 1:  # a tuple all the same
        head, result = text.rstrip().rsplit("    return ", 1)
        text = f"{head}    return ({result},)\n"
    all_d = [*traced.d_pre, *traced.d_rec, *traced.d_state]
    return text, function(gradients, [*traced.arguments, *traced.cotangents], all_d, like, triton=False)


def check(cell: StepFunction) -> None:
    """Raises NotLowered unless the step, of a cell without matrices, can be traced and does to tensors what was traced (it may ask what it is
    given), ValueError for a step that no solver can run."""
    traced = trace(cell)
    names: dict[str, Any] = {"torch": torch}
    exec(function("step", traced.arguments, traced.new, "h0", triton=False), names)  # our own text, as below
    given = [[3 * torch.randn(64, dtype=torch.float64) for _ in role] for role in (cell.pre, cell.rec, cell.state)]
    try:
        new = cell(*given)
    except Exception:  # models say it in a sentence (Cell.problem), and a call of the step says it itself
        return
    wanted = names["step"](*given[0], *given[1], *given[2])
    compare(cell, new, wanted if len(new) > 1 else (wanted,))


def compare(cell: StepFunction, new: Sequence[torch.Tensor], traced: Sequence[torch.Tensor]) -> None:
    """Raises NotLowered if the step made something else of tensors than what was traced does."""
    if not all(torch.allclose(a, b, rtol=1e-6, equal_nan=True) for a, b in zip(new, traced)):
        raise NotLowered(
            f"Cell {cell.name} runs as a loop in plain torch: its step does to tensors something else than to what stands for them."
        )


def jumps(cell: StepFunction) -> bool:
    """Whether a lowered cell's new state may jump where an old one is changed a little."""
    return trace(cell).jumps


@functools.cache
def torch_functions(cell: StepFunction) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(jacobian, step_vjp) of a lowered cell's step as plain torch functions, each returning a tuple. Raises NotLowered."""
    names: dict[str, Any] = {"torch": torch}
    for text in derivatives(trace(cell)):
        exec(text, names)  # our own text, made of the operations of operations.py
    return names["jacobian"], names["step_vjp"]
