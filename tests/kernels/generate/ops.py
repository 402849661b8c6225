"""Random problems for the operations around the recurrence: Mamba-2's scan, the convolution, norms, products, rotary positions, the loss, and the
decoding steps.

    python -m tests.kernels.generate.ops ssd 1234 --device cuda                                   one case again
    python -m tests.kernels.generate.ops --device cuda --cases 200 --out FILE.json --jobs 8       many, with new seeds; goes on if FILE.jsonl is there

--device interpreter runs the kernels in Triton's interpreter, cpu what runs without a GPU. Legend: B batch, T time, D channels, W width of a
convolution, H heads, P head width, G groups, N state width, V vocabulary, K head width of attention or inputs of a product.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy
from kernels.decode_step import Convolution, cell_step, project
from kernels.decode_step import ssm as decode_ssm
from kernels.gated_norm import gated_norm
from kernels.mamba2_step import mamba2_step
from kernels.parallel_rnn import parallel_rnn_step
from kernels.residual import residual
from kernels.rotary import rotary
from kernels.rotary.reference import frequencies
from kernels.short_conv import last_inputs, short_conv, short_conv_columns
from kernels.ssd import border, ssd
from kernels.swiglu import swiglu
from models.cells import available, load_cell
from models.head import Head
from tests.kernels.generate.case import Answers, Draw, main

Function = Callable[..., Any]
RANGE = {torch.float32: (-8.0, 8.0), torch.bfloat16: (-8.0, 8.0), torch.float16: (-1.0, 1.0)}  # powers of ten that values are scaled by


def widened(tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def outputs(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def differentiated(
    draw: Draw, ours: Function, exact: Function, leaves: dict[str, Tensor | None], names: Sequence[str], description: str, coarse: float = 1.0,
    dtype: torch.dtype = torch.float32, products: bool = False,
) -> Answers:  # fmt: skip
    """Outputs and gradients of all leaves, under random cotangents. `exact` is written out for tensors of any dtype and run in fp64 and in fp32."""
    device = draw.device
    given = [None if t is None else draw.laid(t.to(device)).detach().requires_grad_() for t in leaves.values()]
    size = draw.magnitude(-3, 3)

    def run(f: Function, tensors: list[Any], cotangents: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        leaves_ = [None if t is None else t.requires_grad_() for t in tensors]
        made = outputs(f(*leaves_))
        if cotangents is None:
            cotangents = [(size * draw.randn(*y.shape)).to(device, y.dtype) for y in made]
        wanted = [t for t in leaves_ if t is not None]
        found = torch.autograd.grad(made, wanted, [c.to(y.dtype) for c, y in zip(cotangents, made)], allow_unused=True)
        return [*(y.detach() for y in made), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found))], cotangents

    labels = [*names, *(f"d {name}" for name, t in leaves.items() if t is not None)]
    found, cotangents = run(ours, given, None)
    wanted = run(exact, widened(given, torch.float64), cotangents)[0]
    loop = run(exact, widened(given, torch.float32), cotangents)[0]
    return kept(labels, found, wanted, loop, description, coarse, draw.within(dtype, products))


def kept(
    labels: Sequence[str], found: Sequence[Tensor], wanted: Sequence[Tensor], loop: Sequence[Tensor], description: str, coarse: float = 1.0,
    within: torch.dtype = torch.float32,
) -> Answers:  # fmt: skip
    return Answers(*(dict(zip(labels, tensors)) for tensors in (found, wanted, loop)), description, coarse, within)


def scan_definition(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor | None, D: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    (B, T, H, P), (G, N) = x.shape, Bm.shape[2:]
    h, out = x.new_zeros(B, H, P, N) if h0 is None else h0, []
    for t in range(T):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], 0.0, h)
        into, read = (m[:, t].repeat_interleave(H // G, 1) for m in (Bm, Cm))
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * into[:, :, None]
        out.append((h * read[:, :, None]).sum(-1))
    y = torch.stack(out, 1) if out else 1 * x
    return y if D is None else y + x * D[:, None], h if T else h + 0 * x.sum()


def _scan(draw: Draw) -> tuple[dict[str, Tensor | None], Tensor | None, str, torch.dtype]:
    B, G, R = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3, 9])
    T = draw.size(127, 128, 129, 300, 513, small=(0, 1, 2, 7, 16, 33, 61))
    P, N = (draw.size(24, 31, 40, 48, 64, 80, small=(1, 3, 8, 16, 17)) for _ in range(2))
    dtype, H = draw.dtype(), G * R
    wide = dtype != torch.float16  # whose range is short
    scale = [draw.magnitude() if wide else 1.0 for _ in range(3)]
    x, Bm, Cm = (s * draw.randn(B, T, *sizes) for s, sizes in zip(scale, ((H, P), (G, N), (G, N))))
    regime = draw.choice(["even", "even", "uneven", "tiny", "fast", "any"])
    dt = F.softplus(draw.randn(B, T, H))
    A = -(0.1 + draw.rand(H))
    if regime == "uneven":
        dt = torch.where(torch.arange(T)[:, None] % 7 == 0, 20.0, 1e-4).expand(B, T, H).clone()
    elif regime == "tiny":
        dt = 1e-7 * dt
    elif regime == "fast":
        dt, A = 0.1 * dt, 1e3 * A
    elif regime == "any":
        dt = 10 ** (4 * draw.rand(B, T, H) - 3)
    starts = draw.starts(B, T)
    leaves: dict[str, Tensor | None] = {"x": x.to(dtype), "dt": dt, "A": A, "B": Bm.to(dtype), "C": Cm.to(dtype)}
    leaves["h0"] = draw.magnitude(-8, 4) * draw.randn(B, H, P, N) if draw.chance(0.6) else None
    leaves["D"] = draw.randn(H) if draw.chance(0.6) else None
    return leaves, starts, f"B {B}, T {T}, H {H}, P {P}, G {G}, N {N}, {dtype}, {regime}", dtype


def products(draw: Draw, dtype: torch.dtype) -> float:
    """How coarse matrix products are: those of fp32 are three of tf32 on a GPU."""
    return 4.0 if dtype != torch.float32 else 2.0 if draw.small else 8.0


def scan(draw: Draw) -> Answers:
    leaves, starts, description, dtype = _scan(draw)
    starts, chunk = None if starts is None else starts.to(draw.device), draw.choice([1, 5, 16, 64, 256])
    return differentiated(
        draw, lambda x, dt, A, B, C, h0, D: ssd(x, dt, A, B, C, h0, starts, chunk=chunk, D_H=D),
        lambda *t: scan_definition(*t, starts), leaves, ("y", "final"), f"{description}, chunk {chunk}", products(draw, dtype), dtype, True,
    )  # fmt: skip


def scan_borders(draw: Draw) -> Answers:
    """What a slice of a scan tells the next one, and in the backward pass the one before."""
    leaves, starts, description, dtype = _scan(draw)
    x, dt, A, Bm, Cm = (leaves[n].to(draw.device) for n in ("x", "dt", "A", "B", "C"))  # type: ignore[union-attr]
    if not x.shape[1]:
        return Answers({}, {}, {}, description)
    starts = None if starts is None else starts.to(draw.device)

    def exact(x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, dy: Tensor) -> list[Tensor]:
        h0 = torch.zeros(x.shape[0], x.shape[2], x.shape[3], Bm.shape[3], dtype=x.dtype, device=x.device).requires_grad_()
        y, final = scan_definition(x, dt, A, Bm, Cm, h0, None, starts)
        start, through = torch.autograd.grad((y * dy).sum(), h0, retain_graph=True)[0], torch.autograd.grad(final.sum(), h0)[0][:, :, 0, 0]
        return [final.detach(), through, start, through]

    dy = draw.randn(*x.shape).to(x)
    wanted, loop = (exact(*widened((x, dt, A, Bm, Cm, dy), kind)) for kind in (torch.float64, torch.float32))
    if starts is not None:  # what lies in another document may be anything
        document = starts.int().cumsum(1)
        behind, ahead = document != document[:, -1:], document != 0
        x[behind], Bm[behind], dy[ahead], Cm[ahead] = math.nan, math.inf, math.nan, math.inf
        both = behind & ahead
        dt[both] = math.nan
    found = [*border.end_state(x, dt, A, Bm, starts), *border.start_adjoint(dy, dt, A, Cm, starts)]
    # Weights are rounded to the inputs' dtype on a GPU, and sums of 16-bit products come in fp32.
    coarse = [t.to(dtype).float() if dtype != torch.float32 else t for t in loop]
    return kept(("end", "through", "adjoint", "left"), found, wanted, coarse, description)


def scan_not_finite(draw: Draw) -> Answers:
    """One document is not finite: the others, and the state if it is another's, are as they would be."""
    leaves, _, description, dtype = _scan(draw)
    x = leaves["x"]
    assert x is not None
    B, T = x.shape[:2]
    if T < 5:
        return Answers({}, {}, {}, description)
    a, e = sorted(draw.sample(range(1, T), 2))
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, [a, e]] = True
    name, place = draw.choice(["x", "dt", "B", "C"]), draw.randrange(a, e)
    bad = leaves[name]
    assert bad is not None
    bad[0, place] = draw.choice([math.nan, math.inf])
    given = [None if t is None else t.to(draw.device) for t in leaves.values()]
    starts = starts.to(draw.device)
    others = torch.ones(T, dtype=torch.bool)
    others[a:e] = False
    with torch.no_grad():
        x_, dt, A, Bm, Cm, h0, D = given
        assert x_ is not None and dt is not None and A is not None and Bm is not None and Cm is not None
        y, final = ssd(x_, dt, A, Bm, Cm, h0, starts, D_H=D)
        exact = [scan_definition(*widened(given, kind), starts) for kind in (torch.float64, torch.float32)]
    parts = [(y_[:, others], final_) for y_, final_ in ((y, final), *exact)]
    return kept(("y", "final"), *parts, f"{description}, {name} at {place} of {a}..{e}", products(draw, dtype), draw.within(dtype, True))


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
                own = convolution_definition(x[..., first : first + D], history, weight, bias, starts, silu)
                return x[..., :first], own, x[..., first + D :]

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

    found, wanted, loop = (
        run(short_conv, torch.float32),
        run(convolution_definition, torch.float64),
        run(convolution_definition, torch.float32),
    )
    return kept(("y", "d x"), found, wanted, loop, f"B {B}, T {T}, D {D}, W {W}, {a}..{e}, silu {silu}", 5.0)


def convolution_history(draw: Draw) -> Answers:
    """The inputs that the next call needs, zero where they are of an earlier document, though what lies there be NaN."""
    B, T, D, W = draw.choice([1, 3]), draw.choice([0, 1, 2, 3, 9]), 3, draw.choice([2, 4, 7])
    x, history, starts = draw.randn(B, T, D), draw.randn(B, W - 1, D), draw.starts(B, T)
    padded = torch.cat([history, x], 1)
    document = F.pad(torch.zeros(B, T) if starts is None else starts.int().cumsum(1), (W - 1, 0))
    last = document[:, -1:] if T else document[:, -1:]
    wanted = torch.where((document == last)[..., None], padded, 0.0)[:, T:]
    padded[(document != last)[..., None].expand_as(padded)] = math.nan
    found = last_inputs(
        padded[:, W - 1 :].to(draw.device), padded[:, : W - 1].to(draw.device), W, None if starts is None else starts.to(draw.device)
    )
    return Answers({"history": found}, {"history": wanted.double()}, {"history": wanted}, f"B {B}, T {T}, W {W}")


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


def labels_of(draw: Draw, rows: int, V: int) -> Tensor:
    labels = draw.integers(0, V, rows)
    labels[draw.rand(rows) < 0.2] = -100
    return labels.to(draw.device, draw.choice([torch.int64, torch.int32]))


def loss_of_rows(draw: Draw) -> Answers:
    """The loss of logits and its gradient: large and equal logits, infinite ones, rows that do not count and hold NaN."""
    rows, V = draw.size(100, 500, small=(1, 2, 5, 9)), draw.size(127, 8192, 8193, 50257, small=(1, 2, 64, 65, 130))
    dtype = draw.dtype(interpreter=True)
    logits = (draw.choice([1e-8, 1.0, 4.0, 300.0]) * draw.randn(rows, V)).to(dtype).to(draw.device)
    labels = labels_of(draw, rows, V)
    logits[labels == -100] = math.nan
    if draw.chance(0.3) and V > 1:
        other = torch.arange(V, device=draw.device) != labels[:1]
        logits[:1] = torch.where(other, -math.inf, logits[:1])
    g = [draw.randn(rows).to(draw.device) for _ in range(2)]
    counted = labels != -100
    nll, log_z = cross_entropy.losses(logits, labels)
    d = cross_entropy.gradient_(logits.clone(), labels, log_z, *g)

    def exact(kind: torch.dtype) -> list[Tensor]:
        leaf = logits[counted].to(kind).requires_grad_()
        z = torch.logsumexp(leaf, -1)
        nll_ = z - leaf.gather(1, labels[counted].long()[:, None])[:, 0]
        gradient = torch.autograd.grad((nll_ * g[0][counted].to(kind)).sum() + (z * g[1][counted].to(kind)).sum(), leaf)[0]
        whole = [torch.zeros(rows, dtype=kind, device=leaf.device) for _ in range(2)] + [
            torch.zeros(rows, V, dtype=kind, device=leaf.device)
        ]
        for all_, part in zip(whole, (nll_, z, gradient)):
            all_[counted] = part.detach()
        return whole

    return kept(
        ("nll", "log z", "d logits"), (nll, log_z, d), exact(torch.float64), exact(torch.float32), f"rows {rows}, V {V}, {dtype}", 2.0
    )


def loss_of_head(draw: Draw) -> Answers:
    """The head and its loss in pieces, with rows that do not count."""
    rows, D, V = draw.size(100, 700, small=(0, 1, 2, 5, 9)), draw.size(64, 200), draw.size(127, 8193, small=(2, 64, 65))
    chunk, recompute = draw.choice([1, 3, 2048]), draw.chance(0.6)
    labels = labels_of(draw, rows, V)
    h = (draw.magnitude(-8, 2) * draw.randn(rows, D)).to(draw.device)
    h[labels == -100] = math.nan
    head = Head(D, V).to(draw.device)
    with torch.no_grad():
        head.weight.copy_(draw.randn(V, D))
    counted, g = labels != -100, [draw.randn(rows).to(draw.device) for _ in range(2)]

    def run(f: Function, kind: torch.dtype) -> list[Tensor]:
        leaf, weight = h.detach().to(kind).requires_grad_(), head.weight.detach().to(kind).requires_grad_()
        nll, log_z = f(leaf, weight)
        d_h, d_weight = torch.autograd.grad(
            (nll * g[0].to(kind)).sum() + (log_z * g[1].to(kind)).sum(), (leaf, weight if f is exact else head.weight)
        )
        return [nll.detach(), log_z.detach(), torch.where(counted[:, None], d_h, 0.0) if f is exact else d_h, d_weight]

    def exact(leaf: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.where(counted[:, None], leaf, 0.0) @ weight.T
        z = torch.logsumexp(logits, -1)
        nll = z - logits.gather(1, labels.clamp(min=0).long()[:, None])[:, 0]
        return torch.where(counted, nll, 0.0), torch.where(counted, z, 0.0)

    found = run(lambda leaf, _: head(leaf, labels, chunk=chunk, recompute=recompute), torch.float32)
    return kept(
        ("nll", "log z", "d h", "d weight"), found, run(exact, torch.float64), run(exact, torch.float32),
        f"rows {rows}, D {D}, V {V}, chunk {chunk}, recompute {recompute}", 2.0,
    )  # fmt: skip


def mamba2_token(draw: Draw) -> Answers:
    """One token of Mamba-2 between its projections, on states of any strides, some rows starting a document though their state is not finite."""
    B, G, R = draw.choice([1, 2, 5]), draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    P, N, W, H = draw.size(40, 64), draw.size(64, 128, 200), draw.choice([2, 3, 4, 5]), G * R
    dtype, C, low, high = draw.dtype(interpreter=True), H * P + 2 * G * N, *draw.choice([(0.0, math.inf), (0.3, 0.9)])
    rows = draw.randn(B, H * P + C + H)
    rows[:, -H:] *= 6
    ssm = draw.magnitude(-8, 8) * draw.randn(B, H, P, N)
    past, weight, bias = draw.randn(B, W - 1, C).to(dtype), draw.randn(C, W).to(dtype), draw.randn(C).to(dtype)
    own = (draw.randn(H) - 3, 3 * draw.rand(H), draw.randn(H))
    starts = draw.rand(B) < 0.5 if draw.chance(0.5) else None
    if starts is not None:
        ssm[starts], past[starts] = math.nan, math.inf
    order = draw.choice([(0, 1, 2, 3), (3, 1, 0, 2), (0, 2, 1, 3), (1, 0, 3, 2)])
    back = [order.index(i) for i in range(4)]
    state = ssm.permute(order).contiguous().permute(back).to(draw.device)
    given = [draw.laid(rows.to(dtype).to(draw.device)), *(t.to(draw.device) for t in (past, weight, bias, *own))]
    fresh = None if starts is None else starts.to(draw.device)

    def exact(kind: torch.dtype) -> list[Tensor]:
        row, past_, w, b, dt_bias, A_log, skip, h = widened([*given, state], kind)
        if fresh is not None:
            past_, h = torch.where(fresh[:, None, None], 0.0, past_), torch.where(fresh[:, None, None, None], 0.0, h)
        window = torch.cat([past_, row[:, None, H * P : H * P + C]], 1)
        mixed = (window * w.T).sum(1) + b
        mixed = mixed * torch.sigmoid(mixed)
        x, into, out = mixed[:, : H * P].unflatten(1, (H, P)), mixed[:, H * P : H * P + G * N], mixed[:, H * P + G * N :]
        into, out = (t.unflatten(1, (G, N)).repeat_interleave(R, 1) for t in (into, out))
        dt = F.softplus(row[:, -H:] + dt_bias, threshold=1e9 if kind == torch.float64 else 20).clamp(low, high)
        h = torch.exp(-dt * torch.exp(A_log))[..., None, None] * h + (dt[..., None] * x)[..., None] * into[:, :, None]
        return [((h * out[:, :, None]).sum(-1) + skip[:, None] * x).flatten(1), window[:, 1:], h]

    in_place = draw.chance(0.5)
    wanted, loop = exact(torch.float64), exact(torch.float32)
    found = mamba2_step(*given, state, fresh, G, low, high, in_place)
    assert not in_place or found[2] is state
    return kept(
        ("y", "past", "ssm"),
        found,
        wanted,
        loop,
        f"B {B}, H {H}, P {P}, G {G}, N {N}, W {W}, {dtype}, order {order}",
        5.0,
        draw.within(dtype),
    )


def cell_token(draw: Draw) -> Answers:
    """One token of a nonlinear cell, with a bias that may be narrower than the weights."""
    cell = load_cell(draw.choice([*available()]))
    B, D, S = draw.choice([1, 3]), draw.size(64, 300), len(cell.state)
    pre, rec, bias = (
        draw.randn(B, len(cell.pre), D).to(draw.dtype(True)),
        draw.rand(len(cell.rec), D) - 0.5,
        draw.randn(len(cell.pre), D).to(draw.dtype()),
    )
    h = draw.magnitude(-8, 0) * draw.randn(B, S, D)
    pre, rec, bias, h = (t.to(draw.device) for t in (pre, rec, bias, h))

    def exact(kind: torch.dtype) -> Tensor:
        p, r, b, state = widened((pre, rec, bias, h), kind)
        return torch.stack(tuple(cell((p + b).unbind(1), r.unbind(0), state.unbind(1))), 1)

    with torch.no_grad():
        found = parallel_rnn_step(cell, pre, rec, h, bias)
        return kept(
            ("state",),
            (found,),
            (exact(torch.float64),),
            (exact(torch.float32),),
            f"{cell.name}, B {B}, D {D}, {pre.dtype}, {bias.dtype}",
            4.0,
        )


def fused_projection(draw: Draw) -> Answers:
    """A projection of the fused decoding step with what surrounds it. Kernels only."""
    B, N, K = draw.choice([1, 2, 5, 8]), draw.size(100, 513, 2048, small=(1, 3, 17, 64)), draw.size(100, 1024, 1500, small=(1, 3, 17, 64))
    dtype, eps, W = draw.dtype(interpreter=True), 1e-5, draw.choice([0, 0, 2, 4])
    x, out = draw.randn(B, K), draw.randn(B, N)
    weight, pair = (draw.randn(N, K).to(dtype) for _ in range(2))
    gate, normed, paired, add, first = draw.randn(B, K), draw.chance(0.6), draw.chance(0.3), draw.chance(0.4), draw.chance(0.5)
    gated, keep, norm_weight = draw.chance(0.4), draw.randn(N) if draw.chance(0.5) else None, draw.randn(K)
    C, begin = (max(1, N // 2), N // 3) if W else (0, 0)
    C = min(C, N - begin)
    taps, tap_bias, past = draw.randn(C, max(W, 1)), draw.randn(C), draw.randn(B, max(W - 1, 1), C)
    acted = draw.choice([(0, 0), (0, N), (N // 2, N)]) if not W else (0, begin)
    x, out, weight, pair, gate, norm_weight, taps, tap_bias, past = (
        t.to(draw.device) for t in (x, out, weight, pair, gate, norm_weight, taps, tap_bias, past)
    )
    keep = None if keep is None else keep.to(draw.device)

    def silu(t: Tensor) -> Tensor:
        return t * torch.sigmoid(t)

    def exact(kind: torch.dtype) -> list[Tensor]:
        v, w, w2, z, nw, old, t, b, before = widened((x, weight, pair, gate, norm_weight, out, taps, tap_bias, past), kind)
        if gated and first:
            v = v * z
        if normed:
            v = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps) * nw
        if gated and not first:
            v = v * z
        y = v @ w.T
        if paired:
            y = silu(y) * (v @ w2.T)
        if W:
            window = torch.cat([before, y[:, None, begin : begin + C]], 1)
            y = torch.cat([y[:, :begin], silu((window * t.T).sum(1) + b), y[:, begin + C :]], 1)
            before = window[:, 1:]
        y = torch.cat([y[:, : acted[0]], silu(y[:, acted[0] : acted[1]]), y[:, acted[1] :]], 1)
        return [y + old * (1.0 if keep is None else keep.to(kind)) if add else y, before]

    wanted, loop = exact(torch.float64), exact(torch.float32)
    project(
        x, weight, out, norm_K=norm_weight if normed else None, eps=eps, gate_BK=gate if gated else None, gate_first=first,
        pair_NK=pair if paired else None, conv=Convolution(begin, taps, tap_bias, past) if W else None, silu=acted, add=add, keep_N=keep if add else None,
    )  # fmt: skip
    options = f"norm {normed}, gate {gated} first {first}, pair {paired}, conv {W}, add {add}"
    return kept(("out", "past"), (out, past), wanted, loop, f"B {B}, N {N}, K {K}, {dtype}, {options}", 4.0)


def fused_recurrences(draw: Draw) -> Answers:
    """The recurrences of the fused decoding step: Mamba-2's, or a cell's with its projection head by head. Kernels only."""
    B = draw.choice([1, 2, 8])
    if draw.chance(0.5):
        G, R, P, N = draw.choice([1, 2]), draw.choice([1, 3]), draw.size(40, 64), draw.size(64, 128)
        H = G * R
        row = draw.randn(B, H * P + 2 * G * N + H)
        row[:, -H:] *= 6
        own = (draw.randn(H) - 3, 3 * draw.rand(H), draw.randn(H))
        row, state, *own_ = (t.to(draw.device) for t in (row, draw.magnitude(-8, 8) * draw.randn(B, H, P, N), *own))
        x, into, out, dt = row.split([H * P, G * N, G * N, H], 1)

        def exact(kind: torch.dtype) -> list[Tensor]:
            x_, i, o, d, bias, A_log, skip, h = widened((x, into, out, dt, *own_, state), kind)
            i, o = (t.unflatten(1, (G, N)).repeat_interleave(R, 1) for t in (i, o))
            step, x_ = F.softplus(d + bias, threshold=1e9 if kind == torch.float64 else 20), x_.unflatten(1, (H, P))
            h = torch.exp(-step * torch.exp(A_log))[..., None, None] * h + (step[..., None] * x_)[..., None] * i[:, :, None]
            return [((h * o[:, :, None]).sum(-1) + skip[:, None] * x_).flatten(1), h]

        wanted, loop, y = exact(torch.float64), exact(torch.float32), torch.empty(B, H * P, device=draw.device)
        decode_ssm(x, into, out, dt, *own_, state, y, G, 0.0, math.inf)
        return kept(("y", "state"), (y, state), wanted, loop, f"ssm, B {B}, H {H}, P {P}, G {G}, N {N}", 4.0)
    cell = load_cell(draw.choice([*available()]))
    E, O, dtype = draw.choice([1, 2, 3]), draw.size(64, 100, small=(1, 3, 16, 17)), draw.dtype(interpreter=True)  # noqa: E741
    D, inputs = E * O, len(cell.pre)
    tensors = (
        draw.randn(B, D),
        (draw.randn(E, O, inputs * O) / O**0.5).to(dtype),
        draw.randn(inputs, D).to(dtype),
        draw.rand(len(cell.rec), D) - 0.5,
    )
    u, weight, bias, rec = (t.to(draw.device) for t in tensors)
    state = (draw.magnitude(-8, 0) * draw.randn(B, len(cell.state), D)).to(draw.device)

    def step(kind: torch.dtype) -> Tensor:
        u_, w, b, r, h = widened((u, weight, bias, rec, state), kind)
        pre = torch.einsum("bek,ekpo->bpeo", u_.unflatten(1, (E, O)), w.unflatten(2, (inputs, O))).flatten(2) + b
        return torch.stack(tuple(cell(pre.unbind(1), r.unbind(0), h.unbind(1))), 1)

    wanted_, loop_ = step(torch.float64), step(torch.float32)
    cell_step(cell, u, weight, bias, rec, state)
    return kept(("state",), (state,), (wanted_,), (loop_,), f"{cell.name}, B {B}, E {E}, O {O}, {dtype}", 4.0)


KINDS: dict[str, Callable[[Draw], Answers]] = {
    "ssd": scan, "ssd_borders": scan_borders, "ssd_not_finite": scan_not_finite, "conv": convolution, "conv_not_finite": convolution_not_finite, "conv_history": convolution_history, "norm": norm,
    "residual": sum_of_stream, "swiglu": product, "rotary": turning, "loss": loss_of_rows, "head": loss_of_head, "mamba2_step": mamba2_token,
    "cell_step": cell_token, "project": fused_projection, "fused_step": fused_recurrences,
}  # fmt: skip
KERNELS_ONLY = ("project", "fused_step")


def usable(kind: str, device: str) -> bool:
    return device != "cpu" or kind not in KERNELS_ONLY or os.environ.get("TRITON_INTERPRET") == "1"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(100, main("tests.kernels.generate.ops", KINDS, usable)))
