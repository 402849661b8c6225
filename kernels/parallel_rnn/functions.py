"""The functions of a step in Triton, over `_exp2` and `_reciprocal` (MATHS).

Relative errors are below 1e-6 down to the smallest normal number, or, for inputs in 16 bits (`short` names their type), below a twentieth of the
type's unit roundoff (2.4e-5 for fp16, and nearly everywhere for bf16, 2e-4); what is not a number stays none. A step's latency is what a kernel waits for, so corrections are worked out beside the power of two and the reciprocal and
selected before these are ready: they cost instructions, not time.

Polynomials are minimax fits of the relative error, in fp32 coefficients; those that begin with x begin with it exactly, as a state that a function
leaves nearly as it is would lose the same digits at every step. Where a product's rounding would be multiplied by the size of an
exponent, it is kept as a sum of two.
"""

from __future__ import annotations

import re
import struct

from kernels.parallel_rnn.operations import GELU

LOG2_E = 1.4426950408889634
HIGH = 1.4426950216293335  # LOG2_E in fp32, and what is missing
LOW = LOG2_E - HIGH
LN_2 = 0.6931471805599453

MATHS = {
    "ptx": """
@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _near_tanh(x):  # within 2^-11 of it, an eighth of bf16's unit roundoff; nothing for one minus its square
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

""",
    "portable": """
@triton.jit
def _exp2(x):
    return tl.exp2(x)


@triton.jit
def _reciprocal(x):
    return 1.0 / x


@triton.jit
def _log2(x):
    return tl.log2(x)


@triton.jit
def _near_tanh(x):
    return _tanh(x)

""",
}
EXACT = f"""
@triton.jit
def _left(x, t, BY, REST):  # 1 + what is missing in 2^t, relatively, where t is x BY rounded and BY + REST the factor
    more = 1.0 + {LN_2} * tl.fma(x, REST, tl.fma(x, BY, -t))
    return tl.where(tl.abs(t) < 128.0, more, 1.0)


@triton.jit
def _exp(x):
    t = x * {HIGH}
    return _exp2(t) * _left(x, t, {HIGH}, {LOW})


@triton.jit
def _sigmoid(x):
    t = x * -{HIGH}
    return _reciprocal(tl.fma(_exp2(t), _left(x, t, -{HIGH}, -{LOW}), 1.0))


@triton.jit
def _sigmoid_beside_softplus(x):
    return _sigmoid(x)


@triton.jit
def _tanh(x):  # (1 - e^-2|x|) / (1 + e^-2|x|)
    twice = 2.0 * tl.abs(x)
    e = _exp2(-{HIGH} * twice)
    small = twice * (1.0 + twice * (-0.49999464 + twice * (0.1665636 + twice * (-0.04104248 + twice * 0.0068076057))))
    top = tl.where(twice < 0.5, small, 1.0 - e)
    return _signed(top, x) * _reciprocal(1.0 + e)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(_exp(-tl.abs(x)))
"""
# of -2 log2(e) times the argument: (the size below which it is small, what it is there), within a twentieth of the type's unit roundoff
TANH_NEAR_ZERO = {
    "float16": ("0.18", f"x * ({-LN_2 / 2} + {(LN_2 / 2) ** 3 / 3} * (x * x))"),
    "bfloat16": ("0.05", f"x * {-LN_2 / 2}"),
}
SHORT = f"""
@triton.jit
def _exp(x):
    return _exp2(x * {LOG2_E})


@triton.jit
def _logistic(x):  # of an argument that was scaled: 1 / (1 + 2^x)
    return _reciprocal(1.0 + _exp2(x))


@triton.jit
def _sigmoid(x):
    return _logistic(x * -{LOG2_E})


@triton.jit
def _sigmoid_beside_softplus(x):  # by the power of two that the softplus of the argument takes
    e = _exp2(tl.abs(x) * -{LOG2_E})
    return tl.where(x < 0.0, e, 1.0) * _reciprocal(1.0 + e)


@triton.jit
def _scaled_tanh(x):  # of an argument that was scaled: 2 / (1 + 2^x) - 1, which loses digits near zero
    return tl.where(tl.abs(x) < NEAR, SMALL, 2.0 * _reciprocal(1.0 + _exp2(x)) - 1.0)


@triton.jit
def _tanh(x):
    return _scaled_tanh(x * {-2 * LOG2_E})


@triton.jit
def _softplus(x):  # near one a logarithm loses digits
    e = _exp2(tl.abs(x) * -{LOG2_E})
    soft = tl.where(e < 0.04, e * (1.0 - e * (0.5 - e * {1 / 3})), _log2(1.0 + e) * {LN_2})
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + soft
"""
BOTH = f"""
@triton.jit
def _signed(size, x):  # a size with the sign of x
    return (size.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _small_expm1(x):  # for x from -0.7 to 0.75
    p = 0.16666676 + x * (0.0416667 + x * (0.008332375 + x * (0.001388624 + x * (0.0002013231 + x * 2.5357147e-05))))
    return x * (1.0 + x * (0.5 + x * p))


@triton.jit
def _expm1(x):
    return tl.where((x > -0.7) & (x < 0.75), _small_expm1(x), _exp(x) - 1.0)


@triton.jit
def _log1p(x):
    p = -0.25002313 + x * (0.19958822 + x * (-0.16553505 + x * (0.14937013 + x * (-0.14449053 + x * 0.08860822))))
    small = x * (1.0 + x * (-0.49999988 + x * (0.33334035 + x * p)))
    return tl.where((x > -0.3) & (x < 0.42), small, tl.log(1.0 + x))


@triton.jit
def _sign(x):  # of what is not a number 0, as in torch
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def _bell(x):  # e^(-x^2 / 2), its exponent as the sum of an exact square and a remainder
    size = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)
    head = (size.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return _exp(-0.5 * head * head) * (1.0 + _small_expm1(-0.5 * (size - head) * (size + head)))


@triton.jit
def _normal_pdf(x):
    return 0.3989422804014327 * _bell(x)


@triton.jit
def _tail(x):  # the integral of the bell beyond |x|, over the bell
    size = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)
    s = (size - 3.0) / (size + 3.0)
    p = -0.02272711 + s * (0.001154283 + s * (0.0029927958 + s * (-0.00033671941 + s * (-0.00047068304 + s * (7.1753607e-06 + s * 4.418273e-05)))))
    return (0.4860558 + s * (-0.09652679 + s * (-0.016432324 + s * (0.0451647 + s * p)))) / (1.0 + size)


@triton.jit
def _normal_cdf(x):
    beyond = _tail(x) * _bell(x)
    return tl.where(x > 0.0, 1.0 - beyond, beyond)


@triton.jit
def _silu(x):  # far below zero x e^x, which is normal where e^x is not
    half = _exp(0.5 * x)
    return tl.where(x < -80.0, (x * half) * half, x * _sigmoid(x))


@triton.jit
def _gelu(x):
    beyond, bell = _tail(x), _bell(x)
    return tl.where(x > 0.0, x * (1.0 - beyond * bell), (x * beyond) * bell)


@triton.jit
def _gelu_exponent(x):  # -(A x + B x^3) in powers of two, and what is missing of it
    x = tl.minimum(tl.maximum(x, -64.0, propagate_nan=tl.PropagateNan.ALL), 64.0, propagate_nan=tl.PropagateNan.ALL)
    square = x * x
    square_left = tl.fma(x, x, -square)
    product = tl.fma(square, B_HIGH, 0.0)  # a product alone is joined with the sum after it, and then its rounding is counted twice
    product_left = tl.fma(square, B_HIGH, -product) + square_left * B_HIGH + square * B_LOW
    total = product + A_HIGH
    back = total - product
    total_left = (product - (total - back)) + (A_HIGH - back) + product_left + A_LOW
    t = -x * total
    return t, tl.where(tl.abs(t) < 256.0, {LN_2} * (tl.fma(-x, total, -t) - x * total_left), 0.0)


@triton.jit
def _gelu_gate(x):
    t, left = _gelu_exponent(x)
    return _reciprocal(tl.fma(_exp2(t), 1.0 + left, 1.0))


@triton.jit
def _gelu_tanh(x):
    t, left = _gelu_exponent(x)
    half = _exp2(-0.5 * t)
    return tl.where(t > 100.0, (x * (1.0 - left) * half) * half, x * _reciprocal(tl.fma(_exp2(t), 1.0 + left, 1.0)))


@triton.jit
def _power(x, k):  # by double precision: its exponent is multiplied with a logarithm
    x = tl.where(x == float("-inf"), float("inf"), x)
    return tl.exp2(tl.log2(x.to(tl.float64)) * k).to(tl.float32)


@triton.jit
def _whole_power(x, k: tl.constexpr):
    size = _power(tl.abs(x), k)
    if k % 2 == 0:
        return size
    else:
        return tl.where(x.to(tl.int32, bitcast=True) < 0, -size, size)  # -0 too
"""


def _halves(value: float) -> tuple[float, float]:
    """A number as fp32 holds it, and the rest."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


def library(short: str, maths: str = "portable") -> dict[str, str]:
    """The functions by name. maths: how `_exp2` and `_reciprocal` are written (MATHS)."""
    text = (SHORT if short else EXACT) + BOTH
    for name, form in zip(("NEAR", "SMALL"), TANH_NEAR_ZERO.get(short, ("", ""))):
        text = text.replace(name, form)
    for name, value in zip("AB", GELU):
        for part, number in zip(("HIGH", "LOW"), _halves(value * LOG2_E)):
            text = text.replace(f"{name}_{part}", repr(number))
    parts = ["@triton.jit" + part.rstrip() for part in (MATHS[maths] + text).split("@triton.jit")[1:]]
    return {re.findall(r"def (\w+)", part)[0]: part for part in parts}


def functions(used_in: str, short: str, maths: str = "portable") -> str:
    """The text of the functions that a text uses, and of those that they use."""
    known = library(short, maths)
    wanted, left = set[str](), [used_in]
    while left:
        new = {name for name in re.findall(r"\b_\w+", left.pop()) if name in known} - wanted
        wanted |= new
        left += [known[name] for name in new]
    return "\n\n\n".join(part for name, part in known.items() if name in wanted)
