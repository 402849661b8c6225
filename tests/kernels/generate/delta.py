"""Random problems for the delta rule and what its slices tell each other.

Legend: B batch, T tokens, n updates a token, H heads of values, G groups, K key width, V value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule import border, delta_rule
from kernels.delta_rule.reference import delta_rule_sequential
from kernels.delta_step import delta_step
from tests.kernels.generate.answers import compared, differentiated, products, widened
from tests.kernels.generate.case import Answers, Draw

COARSE = 8.0  # chunks add up what the loop never adds: of keys that repeat most of a sum is cancelled


def _rule(draw: Draw) -> tuple[dict[str, Tensor | None], Tensor | None, dict[str, Any], str, torch.dtype]:
    B, G, R, n = draw.choice([1, 1, 2]), draw.choice([1, 1, 2]), draw.choice([1, 2, 3]), draw.choice([1, 1, 2, 3])
    T, H = draw.size(63, 64, 65, 129, 300, small=(1, 2, 7, 16, 33, 65)), G * R
    K, V = (draw.size(24, 31, 48, 64, 100, 128, small=(1, 3, 8, 16, 17)) for _ in range(2))
    dtype = draw.dtype()
    q, k, v = draw.randn(B, T, G, K), draw.randn(B, T * n, G, K), draw.randn(B, T * n, H, V)
    if dtype != torch.float16:  # whose range is short
        v = draw.magnitude() * v
    if draw.chance(0.3):  # keys that repeat
        k = k[:, :1] + draw.choice([0.0, 0.1]) * k
    strength = draw.choice(["one", "two", "reflections"])
    beta = torch.full((B, T * n, H), 2.0) if strength == "reflections" else (1.0 if strength == "one" else 2.0) * draw.rand(B, T * n, H)
    regime = draw.choice(["none", "slow", "fast", "uneven", "nothing"])
    g = -draw.rand(B, T, H) * {"none": 0.0, "slow": 1e-3, "fast": 30.0, "uneven": 1e-3, "nothing": 0.1}[regime]
    if regime in ("uneven", "nothing"):
        g = torch.where(draw.rand(B, T, H) < 0.2, -60.0 if regime == "uneven" else -math.inf, g)
    leaves: dict[str, Tensor | None] = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "beta": beta}
    leaves["g"] = None if regime == "none" and draw.chance(0.5) else g
    leaves["h0"] = draw.magnitude(-8, 4) * draw.randn(B, H, V, K) if draw.chance(0.6) else None
    options = {"normalize": True, "scale": draw.choice([1.0, K**-0.5])}
    description = f"B {B}, T {T}, n {n}, H {H}, G {G}, K {K}, V {V}, {dtype}, {regime}, {strength}"
    return leaves, draw.starts(B, T), options, description, dtype


def delta(draw: Draw) -> Answers:
    leaves, starts, options, description, dtype = _rule(draw)
    starts = None if starts is None else starts.to(draw.device)
    return differentiated(
        draw, lambda *t: delta_rule(*(*t, starts), **options), lambda *t: delta_rule_sequential(*(*t, starts), **options), leaves, ("o", "final"),
        description, COARSE * products(draw, dtype), dtype, True,
    )  # fmt: skip


def delta_borders(draw: Draw) -> Answers:
    """What a slice tells the next one, and in the backward pass the one before."""
    leaves, starts, options, description, dtype = _rule(draw)
    q, k, v, beta, g, _ = (None if t is None else t.to(draw.device) for t in leaves.values())
    assert q is not None and k is not None and v is not None and beta is not None
    starts = None if starts is None else starts.to(draw.device)
    (B, T), (H, V), K = q.shape[:2], v.shape[2:], q.shape[3]
    do, h = draw.randn(B, T, H, V).to(v), draw.randn(B, H, V, K).to(draw.device)

    def exact(kind: torch.dtype) -> list[Tensor]:
        q_, k_, v_, beta_, g_, do_, h_ = widened((q, k, v, beta, g, do, h), kind)
        begin = torch.zeros_like(h_).requires_grad_()
        o, final = delta_rule_sequential(q_, k_, v_, beta_, g_, begin, starts, **options)
        start = torch.autograd.grad((o * do_).sum(), begin, retain_graph=True)[0]
        _, moved = delta_rule_sequential(q_, k_, 0 * v_, beta_, g_, h_, starts, **options)
        return [final.detach(), moved, start]

    end, through = border.end_state(k, v, beta, g, starts, True, k.shape[1] // T)
    adjoint, _ = border.start_adjoint(do, q, k, beta, g, starts, through, **options)
    loop, found = exact(torch.float32), [end, border.reached(through, h), adjoint]
    coarse = COARSE * products(draw, dtype)
    return compared(("end", "moved", "adjoint"), found, exact(torch.float64), loop, description, coarse, draw.within(dtype, True))


def delta_not_finite(draw: Draw) -> Answers:
    """One document is not finite: the others, and the state if it is another's, are as they would be."""
    leaves, _, options, description, dtype = _rule(draw)
    q, v = leaves["q"], leaves["v"]
    assert q is not None and v is not None
    (B, T), n = q.shape[:2], v.shape[1] // q.shape[1]
    if T < 5:
        return Answers({}, {}, {}, description)
    a, e = sorted(draw.sample(range(1, T), 2))
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, [a, e]] = True
    name, place = draw.choice(["q", "k", "v", "beta"]), draw.randrange(a, e)
    bad = leaves[name]
    assert bad is not None
    bad[0, place * (1 if name == "q" else n)] = draw.choice([math.nan, math.inf])
    given = [None if t is None else t.to(draw.device) for t in leaves.values()]
    starts, others = starts.to(draw.device), torch.ones(T, dtype=torch.bool)
    others[a:e] = False
    with torch.no_grad():
        made = [delta_rule(*(*given, starts), **options)]
        made += [delta_rule_sequential(*(*widened(given, kind), starts), **options) for kind in (torch.float64, torch.float32)]
    parts = [(o[:, others], final) for o, final in made]
    coarse = COARSE * products(draw, dtype)
    return compared(("o", "final"), *(*parts, f"{description}, {name} at {place} of {a}..{e}", coarse, draw.within(dtype, True)))


def delta_token(draw: Draw) -> Answers:
    """One token between the projections of a layer, on states of any strides, some rows starting a document though their state is not finite."""
    B, G, R, n = draw.choice([1, 2, 5]), draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([1, 1, 2, 4])
    V, K, W, H = draw.size(40, 64), draw.size(64, 128, 200), draw.choice([2, 3, 4, 5]), G * R
    dtype, C, gated, strength = draw.dtype(interpreter=True), (n + 1) * G * K + n * H * V, draw.chance(0.7), draw.choice([1.0, 2.0])
    rows = draw.randn(B, 3 + C + (n + gated) * H)
    rows[:, -H:] *= 4
    delta = draw.magnitude(-8, 8) * draw.randn(B, H, V, K)
    past, weight = draw.randn(B, W - 1, C).to(dtype), draw.randn(C, W).to(dtype)
    rates = (draw.randn(H) - 3, 3 * draw.rand(H)) if gated else (None, None)
    starts = draw.rand(B) < 0.5 if draw.chance(0.5) else None
    if starts is not None:
        delta[starts], past[starts] = math.nan, math.inf
    order = draw.choice([(0, 1, 2, 3), (3, 1, 0, 2), (0, 2, 1, 3), (1, 0, 3, 2)])
    state = delta.permute(order).contiguous().permute([order.index(i) for i in range(4)]).to(draw.device)
    moved = [None if t is None else t.to(draw.device) for t in (past, weight, *rates)]
    given, fresh = [draw.laid(rows.to(dtype).to(draw.device)), *moved], None if starts is None else starts.to(draw.device)

    def exact(kind: torch.dtype) -> list[Tensor]:
        row, past_, w, dt_bias, A_log, h = widened([*given, state], kind)
        if fresh is not None:
            past_, h = torch.where(fresh[:, None, None], 0.0, past_), torch.where(fresh[:, None, None, None], 0.0, h)
        window = torch.cat([past_, row[:, None, 3 : 3 + C]], 1)
        mixed = (window * w.T).sum(1)
        q, k, v = (mixed * torch.sigmoid(mixed)).split([G * K, n * G * K, n * H * V], 1)
        beta = strength * torch.sigmoid(row[:, 3 + C : 3 + C + n * H]).view(B, n, H)
        g = None
        if gated:
            g = -torch.exp(A_log) * F.softplus(row[:, -H:] + dt_bias, threshold=1e9 if kind == torch.float64 else 20)[:, None]
        heads = q.reshape(B, 1, G, K), k.reshape(B, n, G, K), v.reshape(B, n, H, V)
        o, h = delta_rule_sequential(*(*heads, beta, g, h, None), normalize=True, scale=K**-0.5)
        return [o.flatten(1), window[:, 1:], h]

    in_place = draw.chance(0.5)
    wanted, loop = exact(torch.float64), exact(torch.float32)
    found = delta_step(*(*given, state, fresh, G, n, strength, K**-0.5, in_place))
    assert not in_place or found[2] is state
    said = f"B {B}, H {H}, V {V}, G {G}, K {K}, W {W}, n {n}, {dtype}, order {order}"
    return compared(("o", "past", "delta"), found, wanted, loop, said, 5.0, draw.within(dtype))
