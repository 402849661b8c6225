"""Random problems for the operations of whole layers: the convolution, norms, products, rotary positions.

Legend: B batch, T time, D channels, W width of a convolution, H heads, G groups, K head width of attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.add_norm import add_norm
from kernels.gated_norm import gated_norm
from kernels.residual import residual
from kernels.rotary import rotary
from kernels.rotary.reference import frequencies
from kernels.short_conv import last_inputs, short_conv, short_conv_columns
from kernels.swiglu import swiglu
from tests.kernels.generate.answers import RANGE, Function, compared, differentiated, widened
from tests.kernels.generate.case import Answers, Draw


def convolution_definition(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, starts: Tensor | None, silu: bool) -> Tensor:
    (B, T, D), W = x.shape, weight.shape[1]
    padded = torch.cat([x.new_zeros(B, W - 1, D) if history is None else history, x], 1)
    document = torch.zeros(B, T, device=x.device) if starts is None else starts.int().cumsum(1)
    document = F.pad(document, (W - 1, 0))
    y = bias.expand(B, T, D)
    for w in range(W):
        same = document[:, w : w + T] == document[:, W - 1 :]
        y = y + torch.where(same[..., None], padded[:, w : w + T], 0.0) * weight[:, w]
    return y * torch.sigmoid(y) if silu else y


def convolution(draw: Draw) -> Answers:
    B, T, D = draw.choice([1, 2, 3]), draw.size(127, 515, 2000, small=(0, 1, 2, 3, 8, 13, 31, 40)), draw.size(33, 256, 300, 513)
    W, silu, dtype = draw.choice([2, 3, 4, 4, 5, 12, 19]), draw.chance(0.5), draw.dtype()
    if B * T < 16 and draw.within(dtype) != torch.float32:
        dtype = torch.float32  # sums of a few rounded gradients may be nothing but their rounding
    size = draw.magnitude(*RANGE[dtype])
    starts = draw.starts(B, T)
    starts = None if starts is None else starts.to(draw.device)
    leaves: dict[str, Tensor | None] = {"x": (size * draw.randn(B, T, D)).to(dtype)}
    leaves["history"] = (size * draw.randn(B, W - 1, D)).to(dtype) if draw.chance(0.6) else None
    leaves |= {"weight": draw.randn(D, W), "bias": size * draw.randn(D)}
    description = f"B {B}, T {T}, D {D}, W {W}, history {leaves['history'] is not None}, silu {silu}, {dtype}"
    if draw.chance(0.3):  # as columns of a projection
        D_all, first = D + 7, draw.choice([0, 3, 7])
        leaves["x"] = (size * draw.randn(B, T, D_all)).to(dtype)

        def parts(f: Function) -> Function:
            def run(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor) -> Any:
                if f is short_conv_columns:
                    return f(x, first, history, weight, bias, starts, silu)
                convolved = convolution_definition(x[..., first : first + D], history, weight, bias, starts, silu)
                return x[..., :first], convolved, x[..., first + D :]

            return run

        return differentiated(
            draw,
            parts(short_conv_columns),
            parts(convolution_definition),
            leaves,
            ("before", "y", "after"),
            f"{description}, columns {first}",
            5.0,
            dtype,
        )
    return differentiated(
        draw, lambda x, h, w, b: short_conv(x, h, w, b, starts, silu), lambda x, h, w, b: convolution_definition(x, h, w, b, starts, silu),
        leaves, ("y",), description, 5.0, dtype,
    )  # fmt: skip


def convolution_not_finite(draw: Draw) -> Answers:
    """One document, or the history, is not finite: outputs and gradients of the others are as they would be."""
    B, T, D, W = draw.choice([1, 2]), draw.size(127, 300, small=(4, 9, 19, 40)), draw.size(33, 300), draw.choice([2, 4, 7])
    a, e = sorted(draw.sample(range(T), 2))
    starts = torch.zeros(B, T, dtype=torch.bool, device=draw.device)
    starts[:, [a, e]] = True
    x, history, weight, bias = (t.to(draw.device) for t in (draw.randn(B, T, D), draw.randn(B, W - 1, D), draw.randn(D, W), draw.randn(D)))
    d, silu = draw.randn(B, T, D).to(draw.device), draw.chance(0.5)
    others = torch.ones(T, dtype=torch.bool)
    others[a:e] = False
    x[0, draw.randrange(a, e)] = draw.choice([math.nan, math.inf])
    if a == 0:
        history[:] = math.nan

    def run(f: Function, kind: torch.dtype) -> list[Tensor]:
        leaf = x.to(kind).requires_grad_()
        y = f(leaf, *widened((history, weight, bias), kind), starts, silu)[:, others]
        return [y.detach(), torch.autograd.grad(y, leaf, d[:, others].to(kind))[0][:, others]]

    computed, wanted, loop = (
        run(short_conv, torch.float32),
        run(convolution_definition, torch.float64),
        run(convolution_definition, torch.float32),
    )
    return compared(("y", "d x"), computed, wanted, loop, f"B {B}, T {T}, D {D}, W {W}, {a}..{e}, silu {silu}", 5.0)


def convolution_history(draw: Draw) -> Answers:
    """The inputs that the next call needs, zero where they are of an earlier document, though what lies there be NaN."""
    B, T, D, W = draw.choice([1, 3]), draw.choice([0, 1, 2, 3, 9]), 3, draw.choice([2, 4, 7])
    x, history, starts = draw.randn(B, T, D), draw.randn(B, W - 1, D), draw.starts(B, T)
    padded = torch.cat([history, x], 1)
    document = F.pad(torch.zeros(B, T) if starts is None else starts.int().cumsum(1), (W - 1, 0))
    last = document[:, -1:] if T else document[:, -1:]
    wanted = torch.where((document == last)[..., None], padded, 0.0)[:, T:]
    padded[(document != last)[..., None].expand_as(padded)] = math.nan
    computed = last_inputs(
        padded[:, W - 1 :].to(draw.device), padded[:, : W - 1].to(draw.device), W, None if starts is None else starts.to(draw.device)
    )
    return Answers({"history": computed}, {"history": wanted.double()}, {"history": wanted}, f"B {B}, T {T}, W {W}")


def norm(draw: Draw) -> Answers:
    groups = draw.choice([1, 1, 2, 3])
    K = draw.size(48, 257, 2048, 4096, small=(2, 3, 5, 8, 16, 17))  # over one channel gradients are nothing but rounding
    shape = draw.choice([(draw.size(100, 999), groups * K), (2, draw.choice([0, 1, 5, 7]), groups * K), (2, 3, 2, groups * K)])
    dtype, first, gated = draw.dtype(), draw.chance(0.5), draw.chance(0.7)
    size = draw.magnitude(*RANGE[dtype])
    eps = draw.choice([1e-5, 1e-5, 1e-12])
    leaves: dict[str, Tensor | None] = {"h": (size * draw.randn(*shape)).to(dtype)}
    leaves["gate"] = (draw.magnitude(-4, 2) * draw.randn(*shape)).to(dtype) if gated else None
    leaves["weight"] = draw.randn(shape[-1])

    def exact(h: Tensor, gate: Tensor | None, weight: Tensor) -> Tensor:
        act = 1.0 if gate is None else gate * torch.sigmoid(gate)
        v = (h if first else h * act).unflatten(-1, (groups, K))
        y = (v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
        return y * act if first else y

    description = f"{shape}, groups {groups}, gate {gated}, first {first}, eps {eps}, {dtype}, size {size:.1e}"
    # A norm over few channels has gradients that are differences of nearly equal numbers, in the loop as here.
    return differentiated(draw, lambda h, g, w: gated_norm(h, g, w, eps, groups, first), exact, leaves, ("y",), description, 4.0)


def sum_of_stream(draw: Draw) -> Answers:
    shape = (draw.size(100, 3000), draw.size(33, 768, 2049))
    dtype, other = draw.choice([(torch.float32, torch.float32), (torch.float32, torch.float16), (torch.float16, torch.float16)])
    size = draw.magnitude(-8, 8) if dtype == other == torch.float32 else 1.0
    leaves: dict[str, Tensor | None] = {
        "x": (size * draw.randn(*shape)).to(dtype),
        "y": draw.randn(*shape).to(other),
        "scale": draw.randn(shape[1]),
    }
    return differentiated(draw, residual, lambda x, y, s: x * s + y, leaves, ("sum",), f"{shape}, {dtype}, {other}", 4.0, other)


def stream_and_norm(draw: Draw) -> Answers:
    shape = (draw.size(100, 3000), draw.size(33, 768, 2049))
    other, scaled = draw.choice([torch.float32, torch.float16]), draw.choice([True, False])
    leaves: dict[str, Tensor | None] = {
        "x": draw.magnitude(-3, 3) * draw.randn(*shape),
        "y": draw.randn(*shape).to(other),
        "scale": draw.randn(shape[1]) if scaled else None,
        "weight": draw.randn(shape[1]),
    }

    def plain(x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        r = (x if scale is None else x * scale) + y
        return r, r * torch.rsqrt(r.square().mean(-1, keepdim=True) + 1e-5) * weight

    def ours(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        return add_norm(*(*given, 1e-5))  # type: ignore[arg-type]

    return differentiated(draw, ours, plain, leaves, ("sum", "norm"), f"{shape}, {other}, scaled {scaled}", 6.0, other)


def product(draw: Draw) -> Answers:
    shape = (draw.size(100, 3000), draw.size(33, 2816))
    dtype = draw.dtype()
    low, high = RANGE[dtype]
    gate, up = draw.magnitude(low, min(high, 2)) * draw.randn(*shape), draw.magnitude(low, high) * draw.randn(*shape)
    leaves: dict[str, Tensor | None] = {"gate": gate.to(dtype), "up": up.to(dtype)}
    return differentiated(draw, swiglu, lambda g, u: g * torch.sigmoid(g) * u, leaves, ("y",), f"{shape}, {dtype}", 3.0, dtype)


def turning(draw: Draw) -> Answers:
    B, T, G, K = (
        draw.choice([1, 2]),
        draw.size(77, 1024, small=(0, 1, 2, 7)),
        draw.choice([1, 2, 3]),
        2 * draw.size(32, 40, 64, 128, small=(1, 3, 8)),
    )
    H, theta, dtype = G * draw.choice([1, 2, 5]), draw.choice([100.0, 10000.0, 500000.0]), draw.dtype()
    positions = (torch.arange(T) + draw.choice([0, 3, 100_003, 1_000_003])).to(draw.device)
    # Far out the angle itself is rounded: it is to be the one of fp32, which models are trained with.
    angle = positions.float()[:, None] * frequencies(K, theta, positions.device)

    def exact(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        cos, sin = angle.to(q.dtype).cos(), angle.to(q.dtype).sin()
        return tuple(torch.cat([a * cos - b * sin, b * cos + a * sin], -1) for a, b in (x.chunk(2, -1) for x in (q, k)))

    leaves: dict[str, Tensor | None] = {
        "q": draw.randn(B, H, T, K).to(dtype),
        "k": (draw.magnitude(-4, 2) * draw.randn(B, G, T, K)).to(dtype),
    }
    return differentiated(
        draw,
        lambda q, k: rotary(q, k, positions, theta),
        exact,
        leaves,
        ("q turned", "k turned"),
        f"B {B}, T {T}, H {H}, G {G}, K {K}, {dtype}",
        2.0,
    )
