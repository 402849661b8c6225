"""What a step may do and still become a kernel: torch's functions and methods by the operations they are made of.

Each rule takes a graph and torch's own arguments under torch's own names, so that an argument it does not know, wherever it stands, is refused
rather than lost. Rules build nodes of `kernels/parallel_rnn/trace.py`; OPERATIONS says how each kind of node is written.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class NotLowered(Exception):
    """A cell does something that cannot be turned into a kernel; the message says what, in one sentence."""


class Form(NamedTuple):
    """How an operation is written in torch and in Triton (kernels/parallel_rnn/functions.py has what begins with _)."""

    torch: str
    triton: str


GELU = (math.sqrt(8 / math.pi), 0.044715 * math.sqrt(8 / math.pi))  # x sigmoid(A x + B x^3) is its approximation by tanh
NAN = "propagate_nan=tl.PropagateNan.ALL"
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
BOOLEAN = (*COMPARISONS, "and", "or", "not")
OPERATIONS: dict[str, Form] = {
    "add": Form("({} + {})", "({} + {})"),
    "sub": Form("({} - {})", "({} - {})"),
    "mul": Form("({} * {})", "({} * {})"),
    "div": Form("({} / {})", "({} / {})"),
    "neg": Form("(-{})", "(-{})"),
    "sigmoid": Form("torch.sigmoid({})", "_sigmoid({})"),
    "tanh": Form("torch.tanh({})", "_tanh({})"),
    "exp": Form("torch.exp({})", "_exp({})"),
    "exp2": Form("torch.exp2({})", "_exp2({})"),
    "expm1": Form("torch.expm1({})", "_expm1({})"),
    "log": Form("torch.log({})", "tl.log({})"),
    "log1p": Form("torch.log1p({})", "_log1p({})"),
    "sqrt": Form("torch.sqrt({})", "tl.sqrt({})"),
    "rsqrt": Form("torch.rsqrt({})", "tl.rsqrt({})"),
    "sin": Form("torch.sin({})", "tl.sin({})"),
    "cos": Form("torch.cos({})", "tl.cos({})"),
    "erf": Form("torch.erf({})", "tl.erf({})"),
    "abs": Form("torch.abs({})", "tl.abs({})"),
    "sign": Form("torch.sign({})", "_sign({})"),
    "relu": Form("torch.relu({})", f"tl.maximum({{}}, 0.0, {NAN})"),
    "softplus": Form("torch.nn.functional.softplus({})", "_softplus({})"),
    "silu": Form("torch.nn.functional.silu({})", "_silu({})"),
    "gelu": Form("torch.nn.functional.gelu({})", "_gelu({})"),
    "gelu_tanh": Form("torch.nn.functional.gelu({}, approximate='tanh')", "_gelu_tanh({})"),
    "normal_cdf": Form("(0.5 * torch.special.erfc(-0.7071067811865476 * {}))", "_normal_cdf({})"),
    "normal_pdf": Form("(torch.exp(-0.5 * torch.square({})) * 0.3989422804014327)", "_normal_pdf({})"),
    "gelu_gate": Form(f"torch.sigmoid({GELU[0]!r} * {{0}} + {GELU[1]!r} * torch.pow({{0}}, 3))", "_gelu_gate({})"),
    "power": Form("torch.pow({}, {})", "_power({}, {})"),
    "whole_power": Form("torch.pow({}, {})", "_whole_power({}, {})"),
    "maximum": Form("torch.maximum({}, {})", f"tl.maximum({{}}, {{}}, {NAN})"),
    "minimum": Form("torch.minimum({}, {})", f"tl.minimum({{}}, {{}}, {NAN})"),
    "clamp": Form("torch.clamp({}, {}, {})", f"tl.minimum(tl.maximum({{}}, {{}}, {NAN}), {{}}, {NAN})"),
    "where": Form("torch.where({}, {}, {})", "tl.where({}, {}, {})"),
    "and": Form("({} & {})", "({} & {})"),
    "or": Form("({} | {})", "({} | {})"),
    "not": Form("(~{})", "(~{})"),
    **{name: Form(f"({{}} {sign} {{}})", f"({{}} {sign} {{}})") for name, sign in COMPARISONS.items()},
}
TENSORS_ONLY = ("maximum", "minimum")  # in torch: a number must be made a tensor


def number(value: Any, what: str) -> float:
    if not isinstance(value, (int, float)):
        raise NotLowered(f"{what} must be a number to be lowered to a kernel, not a {type(value).__name__}.")
    return float(value)


def _unary(name: str) -> Callable[..., Any]:
    return lambda g, input: g.make(name, input)


def _binary(name: str) -> Callable[..., Any]:
    return lambda g, input, other: g.make(name, input, other)


def _in_place(inplace: bool) -> None:
    if inplace:
        raise NotLowered("an operation in place cannot be lowered to a kernel.")


def _add(g: Any, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return g.make("add", input, other if alpha == 1 else g.make("mul", other, number(alpha, "alpha")))


def _sub(g: Any, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return g.make("sub", input, other if alpha == 1 else g.make("mul", other, number(alpha, "alpha")))


def _pow(g: Any, input: Any, exponent: Any) -> Any:
    k = number(exponent, "the exponent")
    if not abs(k) <= 32:
        raise NotLowered(f"the power {exponent!r} cannot be lowered to a kernel; powers from -32 to 32 can.")
    if k in (0.5, -0.5):
        return g.make("sqrt" if k > 0 else "rsqrt", input)
    if k != round(k):
        return g.make("power", input, k)
    if k == 0:
        return g.const(1.0)
    if not -2 <= k <= 8:  # products would round too often
        return g.make("whole_power", input, k)
    base, whole = (g.make("div", 1.0, input), -k) if k < 0 else (input, k)
    half = _pow(g, base, whole // 2) if whole > 1 else base
    return base if whole == 1 else g.make("mul", half, half) if whole % 2 == 0 else g.make("mul", g.make("mul", half, half), base)


def _softplus(g: Any, input: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    beta, threshold = number(beta, "beta"), number(threshold, "threshold")
    scaled = input if beta == 1 else g.make("mul", input, beta)
    soft = g.make("softplus", scaled)
    soft = soft if beta == 1 else g.make("div", soft, beta)
    if beta < 1:  # e^scaled may be too small for a normal number, which divided by beta is none
        half = g.make("exp", g.make("mul", 0.5, scaled))
        soft = g.make("where", g.make("lt", scaled, -80.0), g.make("mul", half, g.make("div", half, beta)), soft)
    return soft if beta == 1 and threshold >= 20 else g.make("where", g.make("gt", scaled, threshold), input, soft)


def _clamp(g: Any, input: Any, min: Any = None, max: Any = None) -> Any:
    low = -math.inf if min is None else number(min, "the lower bound of clamp")
    high = math.inf if max is None else number(max, "the upper bound of clamp")
    if min is None and max is None or math.isnan(low) or math.isnan(high) or low > high:
        raise NotLowered("clamp is lowered to a kernel with bounds that are in order.")
    return g.make("clamp", input, low, high)


def _hardtanh(g: Any, input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    _in_place(inplace)
    low, high = number(min_val, "min_val"), number(max_val, "max_val")
    within = g.make("where", g.make("ge", input, high), high, input)  # not clamp: at its bounds the gradient is zero
    return g.make("where", g.make("le", input, low), low, within)


def _relu6(g: Any, input: Any, inplace: bool = False) -> Any:
    return _hardtanh(g, input, 0.0, 6.0, inplace)


def _hardsigmoid(g: Any, input: Any, inplace: bool = False) -> Any:
    return g.make("div", _hardtanh(g, g.make("add", input, 3.0), 0.0, 6.0, inplace), 6.0)


def _relu(g: Any, input: Any, inplace: bool = False) -> Any:
    _in_place(inplace)
    return g.make("relu", input)


def _leaky_relu(g: Any, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    _in_place(inplace)
    return g.make("where", g.make("gt", input, 0.0), input, g.make("mul", input, number(negative_slope, "negative_slope")))


def _elu(g: Any, input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    _in_place(inplace)
    return g.make("where", g.make("le", input, 0.0), g.make("mul", g.make("expm1", input), number(alpha, "alpha")), input)


def _silu(g: Any, input: Any, inplace: bool = False) -> Any:
    _in_place(inplace)
    return g.make("silu", input)


def _gelu(g: Any, input: Any, approximate: str = "none") -> Any:
    if approximate not in ("none", "tanh"):
        raise NotLowered(f"gelu with approximate={approximate!r} cannot be lowered to a kernel.")
    return g.make("gelu" if approximate == "none" else "gelu_tanh", input)


def _div(g: Any, input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
    if rounding_mode is not None:
        raise NotLowered(f"div with rounding_mode={rounding_mode!r} cannot be lowered to a kernel.")
    return g.make("div", input, other)


def _where(g: Any, condition: Any, input: Any, other: Any) -> Any:
    return g.make("where", condition, input, other)


def _where_method(g: Any, input: Any, condition: Any, other: Any) -> Any:
    return g.make("where", condition, input, other)


def _masked_fill(g: Any, input: Any, mask: Any, value: Any) -> Any:
    return g.make("where", mask, number(value, "value"), input)


def _addcmul(g: Any, input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    product = g.make("mul", tensor1, tensor2)
    return g.make("add", input, product if value == 1 else g.make("mul", product, number(value, "value")))


def _lerp(g: Any, input: Any, end: Any, weight: Any) -> Any:
    way = g.make("sub", end, input)
    early = g.make("add", input, g.make("mul", weight, way))
    late = g.make("sub", end, g.make("mul", way, g.make("sub", 1.0, weight)))
    return g.make("where", g.make("lt", g.make("abs", weight), 0.5), early, late)


def _full_like(g: Any, input: Any, fill_value: Any) -> Any:
    return g.number(number(fill_value, "fill_value"))


def _float(g: Any, input: Any) -> Any:
    if not input.boolean:
        raise NotLowered("a change of precision cannot be lowered to a kernel.")
    return g.make("where", input, 1.0, 0.0)


def _cast(g: Any, input: Any, dtype: Any) -> Any:
    if not isinstance(dtype, Kind):
        raise NotLowered("a change of precision cannot be lowered to a kernel; to(x.dtype) can.")
    return g.make("where", input, 1.0, 0.0) if input.boolean else input


class Kind:
    """What `x.dtype` is in a step that is traced: good for `to` alone."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        raise NotLowered("a step that asks for a precision cannot be lowered to a kernel.")


RULES: dict[str, Callable[..., Any]] = {
    **{n: _unary(n) for n in "neg sigmoid tanh exp exp2 expm1 log log1p sqrt rsqrt sin cos erf abs sign".split()},
    **{n: _binary(n) for n in ("mul", "maximum", "minimum", *COMPARISONS)},
    "add": _add, "sub": _sub, "div": _div, "pow": _pow, "relu": _relu, "softplus": _softplus, "clamp": _clamp, "hardtanh": _hardtanh, "relu6": _relu6,
    "hardsigmoid": _hardsigmoid, "leaky_relu": _leaky_relu, "elu": _elu, "silu": _silu, "gelu": _gelu, "where": _where, "addcmul": _addcmul,
    "lerp": _lerp, "full_like": _full_like,
    "positive": lambda g, input: input,
    "square": lambda g, input: g.make("mul", input, input),
    "reciprocal": lambda g, input: g.make("div", 1.0, input),
    "logsigmoid": lambda g, input: -g.make("softplus", -input),
    "zeros_like": lambda g, input: g.const(0.0),
    "ones_like": lambda g, input: g.const(1.0),
    "logical_and": _binary("and"), "logical_or": _binary("or"), "logical_not": _unary("not"),
}  # fmt: skip
ALIASES = {
    "absolute": "abs", "negative": "neg", "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "clip": "clamp", "sgn": "sign",
    "special_expit": "sigmoid", "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne",
}  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {  # of a tensor, where they are not named as functions are, or take other arguments
    "where": _where_method, "masked_fill": _masked_fill, "float": _float, "to": _cast,
    "type_as": lambda g, input, other: _cast(g, input, other.dtype), "clone": lambda g, input: input,
}  # fmt: skip
NOT_METHODS = {
    "where",
    "softplus",
    "hardtanh",
    "relu6",
    "hardsigmoid",
    "leaky_relu",
    "elu",
    "silu",
    "gelu",
    "logsigmoid",
    "full_like",
    "zeros_like",
    "ones_like",
}
METHODS.update({name: rule for name, rule in RULES.items() if name not in NOT_METHODS})
METHODS.update({alias: RULES[name] for alias, name in ALIASES.items() if hasattr(torch.Tensor, alias)})
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
for _name, _rule in [*RULES.items(), *((alias, RULES[name]) for alias, name in ALIASES.items())]:
    for _place in (torch, F, torch.special):
        if hasattr(_place, _name):
            FUNCTIONS[getattr(_place, _name)] = _rule
FUNCTIONS |= {torch.special.expit: RULES["sigmoid"], torch.nn.functional.softplus: _softplus}
FUNCTIONS |= {getattr(torch.Tensor, n): rule for n, rule in METHODS.items() if hasattr(torch.Tensor, n)}
# asked for, but nothing
DEFAULTS = {"out": None, "dtype": None, "device": None, "memory_format": None, "layout": None, "requires_grad": False}


def apply(name: str, rule: Callable[..., Any], graph: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """The node of a call. Raises NotLowered for arguments the rule does not have."""
    given = {k: v for k, v in (kwargs or {}).items() if not (k in DEFAULTS and v is DEFAULTS[k])}
    try:
        inspect.signature(rule).bind(graph, *args, **given)
    except TypeError:
        extra = f" with {', '.join(given)}" if given else f" with {len(args)} arguments"
        raise NotLowered(f"{name}{extra} cannot be lowered to a kernel.") from None
    return rule(graph, *args, **given)
