"""Prints traced expressions as functions: in Triton for the kernels, in torch for the plain solvers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.trace import Node, NotLowered, order, trace

LOG2_E = 1.4426950408889634
# Through powers of two of a scaled argument. Where a step waits for the step before, `scaled` moves the factor to inputs and weights.
POWERS = {"sigmoid": ("_logistic({})", -LOG2_E), "tanh": ("(2.0 * _logistic({}) - 1.0)", -2 * LOG2_E), "exp": ("_exp2({})", LOG2_E)}
FORMS = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "log": "tl.log({})", "sqrt": "tl.sqrt({})", "softplus": "_softplus({})",
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


def scaled(node: Node, factor: float, written: Callable[[Node], str], fixed: Sequence[str]) -> str:
    """`node` times a number, by its terms. `written`: the text of a node, a name if it is shared; `fixed`: names that stay the same in all steps."""
    text = written(node)
    if node.op in ("add", "sub") and text.startswith("("):
        return " ".join((scaled(node.arguments[0], factor, written, fixed), "+-"[node.op == "sub"], f"({scaled(node.arguments[1], factor, written, fixed)})"))
    if node.op == "mul" and text.startswith("("):
        for one, other in (node.arguments, node.arguments[::-1]):
            if one.op == "var" and one.arguments[0] in fixed:
                return f"({factor!r} * {written(one)}) * {written(other)}"
    return f"{factor!r} * {text}"


def function(name: str, arguments: Sequence[str], results: Sequence[Node], like: str, forms: dict[str, str] = FORMS, fixed: Sequence[str] = ()) -> str:
    """A function (jitted, if in Triton) of the expressions; values used once are written in place, shared ones get a line. Constants
    become tensors shaped as `like`. fixed: arguments that are the same at every step, of a function on whose latency a loop depends."""
    nodes = order(results)
    uses: dict[int, int] = {}
    for node in nodes:
        for argument in node.arguments if node.op not in ("var", "const") else ():
            uses[id(argument)] = uses.get(id(argument), 0) + 1
    for node in results:
        uses[id(node)] = uses.get(id(node), 0) + 1
    text: dict[int, str] = {}
    lines = [("@triton.jit\n" if forms is FORMS else "") + f"def {name}({', '.join(arguments)}):"]
    for node in nodes:
        if node.op in ("var", "const"):
            text[id(node)] = node.arguments[0] if node.op == "var" else repr(node.arguments[0])
            continue
        if node.op in forms:
            form = forms[node.op].format(*(text[id(a)] for a in node.arguments))
        else:
            power, factor = POWERS[node.op]
            argument = node.arguments[0]
            form = power.format(scaled(argument, factor, lambda n: text[id(n)], fixed) if fixed else f"{factor!r} * {text[id(argument)]}")
        if uses.get(id(node), 0) > 1 or len(form) > 90:
            text[id(node)] = f"v{len(lines)}_"
            lines.append(f"    v{len(lines)}_ = {bare(form)}")
        else:
            text[id(node)] = form
    out = [bare(text[id(n)]) if n.op != "const" else f"{'tl' if forms is FORMS else 'torch'}.zeros_like({like}) + {text[id(n)]}" for n in results]
    return "\n".join([*lines, f"    return {', '.join(out)}"]) + "\n"


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
