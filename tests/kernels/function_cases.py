"""Every function that a step may use, evaluated by one Triton kernel and compared with float64: in the interpreter (a process of its own,
`python -m tests.kernels.function_cases`) and on a GPU (test_gpu.py)."""

from __future__ import annotations

import os
from collections.abc import Callable

if __name__ == "__main__":  # the interpreter is chosen when Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.parallel_rnn import launch
from kernels.parallel_rnn.cell import Cell, Pre, Rec, State
from kernels.parallel_rnn.expressions import function
from kernels.parallel_rnn.functions import functions
from kernels.parallel_rnn.step import StepFunction
from kernels.parallel_rnn.trace import trace, vjp

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp, "exp2": torch.exp2, "expm1": torch.expm1, "log": torch.log,
    "log1p": torch.log1p, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sin": torch.sin, "cos": torch.cos, "erf": torch.erf, "abs": torch.abs,
    "sign": torch.sign, "relu": F.relu, "softplus": F.softplus, "softplus_2": lambda x: F.softplus(x, 2.0), "softplus_3": lambda x: F.softplus(x, 0.5, 3.0),
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "square": torch.square, "cube": lambda x: x**3,
    "reciprocal": torch.reciprocal, "power_-2": lambda x: torch.pow(x, -2), "power_-7": lambda x: x**-7, "power_12": lambda x: torch.pow(x, 12), "power_2.5": lambda x: x**2.5, "power_-1.5": lambda x: x.pow(-1.5),
    "root": lambda x: x**0.5, "clamp": lambda x: x.clamp(-1.0, 2.0), "clamp_min": lambda x: torch.clamp(x, min=0.5), "clip": lambda x: torch.clip(x, max=3.0),
    "maximum": lambda x: torch.maximum(x, 0.5 * x), "minimum": lambda x: torch.minimum(x, torch.zeros_like(x)), "leaky_relu": F.leaky_relu,
    "elu": lambda x: F.elu(x, alpha=1.5), "hardtanh": F.hardtanh, "relu6": F.relu6, "hardsigmoid": F.hardsigmoid, "logsigmoid": F.logsigmoid,
    "where": lambda x: torch.where(x > 0, torch.log(x), 2.0 * x), "where_2": lambda x: torch.where((x >= 1) & ~(x == 2) | (x < -1), x, torch.ones_like(x)),
    "masked": lambda x: x * (x != 1) + (x <= -1).to(x.dtype), "lerp": lambda x: torch.lerp(x, 0.5 * x, torch.sigmoid(x)), "nothing": lambda x: 0.0 * x,
    "same": lambda x: x - x, "one": lambda x: x / x,
}  # fmt: skip


def many(x: Pre, y: Pre, a: Rec, b: Rec, c: State, h: State) -> tuple[Tensor, ...]:
    """Most of what lowers, in one cell."""
    z = F.softplus(x + a * h, 2.0)
    gate = torch.where((h > 0) & (x <= 1.0), torch.sigmoid(y), 0.5 * F.silu(y).tanh())
    c = torch.clamp(c, -2.0, 2.0) * gate + F.gelu(x, approximate="tanh") - torch.maximum(c, b * x) / (1 + z)
    h = torch.sin(c) + 0.1 * F.leaky_relu(h) * torch.exp2(-torch.abs(c)) + torch.expm1(-z) * (h != 0)
    return c, h - torch.log1p(c * c) ** 1.5 + torch.rsqrt(1 + c**2) + torch.lerp(h, y, gate)


TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
NAN, INF = float("nan"), float("inf")
KERNEL = """
@triton.jit
def evaluate(X, OUT, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < N, other=1.0)
    {results} = step(x)
    {stores}
"""


def cell_of(call: Callable[[Tensor], Tensor]) -> Cell:
    def step(x: Pre, h: State) -> tuple[Tensor, ...]:
        return (call(x),)

    return Cell.of(StepFunction("a_function", step, ("x",), (), ("h",)))


def evaluate(x: Tensor, short: str, maths: str, slopes: bool = False) -> dict[str, Tensor]:
    """Each function's values, or derivatives, at x (N,) fp32, by one kernel."""
    from kernels.parallel_rnn.trace import Graph

    expressions = []
    for call in FUNCTIONS.values():
        new = trace(cell_of(call)).new
        graph: Graph = new[0].graph
        expressions.append(vjp(new, [graph.const(1)], [graph.leaf("var", "x0")])[0] if slopes else new[0])
    names = [f"y{i}" for i in range(len(FUNCTIONS))]
    steps = []
    for i, expression in enumerate(expressions):  # graphs of their own
        steps.append(function(f"f{i}", ["x0"], [expression], "x0"))
    step = "@triton.jit\ndef step(x):\n    return " + ", ".join(f"f{i}(x)" for i in range(len(steps))) + "\n"
    stores = "\n    ".join(f"tl.store(OUT + {i} * N + i, {name}, mask=i < N)" for i, name in enumerate(names))
    text = "\n\n".join([*steps, step, KERNEL.format(results=", ".join(names), stores=stores)])
    header = "import triton\nimport triton.language as tl\n\n\n"
    module = launch.load_source("functions", header + functions(text, short, maths) + "\n\n\n" + text)
    out = x.new_empty(len(names), x.numel())
    module.evaluate[(-(-x.numel() // 1024),)](x, out, x.numel(), BLOCK=1024)
    return dict(zip(FUNCTIONS, out))


def truth(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, derivatives) in float64; tails without torch's own cancellation."""
    x = x.double().requires_grad_()
    tails = {
        "gelu": lambda x: x * 0.5 * torch.special.erfc(-x / 2**0.5),
        "gelu_tanh": lambda x: x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3)),
    }
    y = tails.get(name, FUNCTIONS[name])(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def points(n: int) -> Tensor:
    """fp32 numbers: all sizes of both signs, the range in which functions bend, multiples of pi, kinks, zeros, infinities, NaN."""
    sizes = torch.logspace(-37.9, 38.5, n, dtype=torch.float64)
    near = torch.linspace(-105, 105, n, dtype=torch.float64)
    exact = torch.tensor(
        [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 3.0, -3.0, 6.0, 20.0, TINY, -TINY, HUGE, -HUGE, INF, -INF, NAN], dtype=torch.float64
    )
    return torch.cat([sizes, -sizes, near, near / 20, torch.pi * torch.arange(1, 40, dtype=torch.float64) / 2, exact]).float()


def worst(name: str, x: Tensor, computed: Tensor, wanted: Tensor, floor: Tensor | float = 0.0) -> tuple[float, float]:
    """(largest relative error where the result is a normal number, the place). What is no number must stay none, an infinity one."""
    computed = computed.double()
    lost = wanted.isnan() != computed.isnan()
    assert not lost.any(), f"{name}: NaN at {x[lost][:4].tolist()}: {computed[lost][:4].tolist()} for {wanted[lost][:4].tolist()}"
    over, under = wanted.abs() > HUGE * (1 + 1e-6), wanted.abs() < TINY * (1 - 1e-6)
    wrong = over & ~(computed.abs() > HUGE * 0.9999) | (computed * wanted < 0) & ~under | under & (computed.abs() > TINY * 1.0001 + floor)
    assert not wrong.any(), f"{name}: at {x[wrong][:4].tolist()}: {computed[wrong][:4].tolist()} for {wanted[wrong][:4].tolist()}"
    clear = (wanted.abs() > TINY * (1 + 1e-5)) & (wanted.abs() < HUGE * (1 - 1e-5))
    error = torch.where(clear, ((computed - wanted).abs() - floor).clamp(min=0) / wanted.abs(), 0.0)
    at = int(error.argmax())
    return float(error[at]), float(x[at])


def check(x: Tensor, ways: list[tuple[str, str]], talk: bool = False) -> None:
    for short, maths in ways:
        allowed = {"": 1e-6, "float16": 2.4e-5, "bfloat16": 1.95e-4}[short]
        values, slopes = evaluate(x, short, maths), evaluate(x, short, maths, slopes=True)
        for name in FUNCTIONS:
            wanted, slope = truth(name, x)
            error, at = worst(name, x, values[name], wanted)
            if talk:
                print(f"{name:12} {short or 'exact'} {maths:8} {error:.1e} at {at:.9g}")
            assert error <= allowed, f"{name}, {short or 'exact'}, {maths}: off by {error:.1e} at {at!r}"
            clear = ~x.isnan() & (x != 0 if name == "where" else x == x)  # torch's gradient of a branch not taken is NaN at log(0)
            clear &= ~(wanted.abs() > HUGE)  # exp2 has lost what its slope would need
            floor = torch.full_like(x, 4e-6 if short else 4e-7)
            if name == "one":  # 1 / x - (x / x) / x
                floor = floor * (1 / x).abs().clamp(min=1.0)
            error, at = worst(f"slope of {name}", x[clear], slopes[name][clear], slope[clear], floor[clear])
            assert error <= 4 * allowed, f"slope of {name}, {short or 'exact'}, {maths}: off by {error:.1e} at {at!r}"


def elsewhere() -> None:
    """A cell of many functions in the decoding kernel and in the kernel of an exported file: right to fp32, its tails too."""
    from kernels import decode_step
    from models.hub.recurrence import written

    cell, g = Cell.from_step(many), torch.Generator().manual_seed(0)
    T, D, (P, R, S) = 5, 6, (len(cell.pre), len(cell.rec), len(cell.state))
    pre, rec, state = (torch.randn(*shape, generator=g) for shape in ((2, T, P, D), (R, D), (2, S, D)))
    pre[0] = pre[0] * 20 - 20  # softplus, gelu and silu of -60
    wanted, new = [], [s.double() for s in state.unbind(1)]
    for t in range(T):
        new = list(cell([x.double() for x in pre[:, t].unbind(1)], [w.double() for w in rec], new))
        wanted.append(torch.stack(new, 1))
    weight, u = torch.eye(D).repeat(1, P)[None].contiguous(), torch.zeros(2, D)  # each row of its own bias, the inputs
    for row in range(2):
        one = state[row : row + 1].clone()
        decode_step.cell_step(cell, u[:1], weight, pre[row, 0].contiguous(), rec, one)
        assert torch.allclose(one.double(), wanted[0][row : row + 1], rtol=3e-6, atol=0), "decoding"
    plain, kernels, _ = written([cell])
    module = launch.load_source(
        "exported",
        "\n\n\n".join(["import torch\nimport triton\nimport triton.language as tl\n\njit = triton.jit", *plain, *kernels]) + "\n",
    )
    states, final = torch.empty(2, T, S, D), torch.empty(2, S, D)
    module.kernel_many[(1, 2)](pre, rec, state, states, states, final, T, D, *pre.stride()[:3], HAS_STARTS=False, BLOCK=8)
    assert torch.allclose(states.double(), torch.stack(wanted, 1), rtol=2e-5, atol=1e-7) and torch.equal(final, states[:, -1]), "exported"
    assert torch.allclose(states[:, 0].double(), wanted[0], rtol=3e-6, atol=0), "exported, the first step"
    x = [t.double() for t in (*pre[1, 0], *rec, *state[1])]
    rows = torch.autograd.functional.jacobian(lambda *h: cell(x[:P], x[P : P + R], h), tuple(x[P + R :]))
    for computed, right in zip(module.jacobian_many(*x), (entry.diagonal() for row in rows for entry in row)):
        assert torch.allclose(computed, right, rtol=1e-9), "exported derivatives"


if __name__ == "__main__":
    from tests.kernels.interpreter import patch_once

    patch_once()
    elsewhere()
    check(points(1500), [("", "portable"), ("float16", "portable"), ("bfloat16", "portable")], talk=True)
    print("ok")
