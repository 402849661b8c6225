"""Random problems for Mamba-2's scan and what its slices tell each other.

Legend: B batch, T time, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ssd import border, ssd
from tests.kernels.generate.answers import compared, differentiated, products, widened
from tests.kernels.generate.case import Answers, Draw


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


def scan(draw: Draw) -> Answers:
    leaves, starts, description, dtype = _scan(draw)
    starts, chunk = None if starts is None else starts.to(draw.device), draw.choice([1, 5, 16, 64, 256])
    return differentiated(
        draw, lambda x, dt, A, B, C, h0, D: ssd(x, dt, A, B, C, h0, starts, chunk=chunk, D_H=D),
        lambda *t: scan_definition(*(*t, starts)), leaves, ("y", "final"), f"{description}, chunk {chunk}", products(draw, dtype), dtype, True,
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
    computed = [*border.end_state(x, dt, A, Bm, starts), *border.start_adjoint(dy, dt, A, Cm, starts)]
    # Weights are rounded to the inputs' dtype on a GPU, and sums of 16-bit products come in fp32.
    coarse = [t.to(dtype).float() if dtype != torch.float32 else t for t in loop]
    return compared(("end", "through", "adjoint", "left"), computed, wanted, coarse, description)


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
        exact = [scan_definition(*(*widened(given, kind), starts)) for kind in (torch.float64, torch.float32)]
    parts = [(y_[:, others], final_) for y_, final_ in ((y, final), *exact)]
    return compared(
        ("y", "final"), *(*parts, f"{description}, {name} at {place} of {a}..{e}", products(draw, dtype), draw.within(dtype, True))
    )
