"""Random problems for decoding steps: Mamba-2's, a cell's, and those of fused layers.

Legend: B batch, W width of a convolution, H heads, P head width, G groups, N state width or outputs, K inputs of a product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.decode_step import Convolution, cell_step, project
from kernels.decode_step import ssm as decode_ssm
from kernels.mamba2_step import mamba2_step
from kernels.parallel_rnn import parallel_rnn_step
from models.cells import diagonal, load_cell
from tests.kernels.generate.answers import compared, widened
from tests.kernels.generate.case import Answers, Draw


def mamba2_token(draw: Draw) -> Answers:
    """One token of Mamba-2 between its projections, on states of any strides, some rows starting a document though their state is not finite."""
    B, G, R = draw.choice([1, 2, 5]), draw.choice([1, 2, 3]), draw.choice([1, 2, 4])
    P, N, W, H = draw.size(40, 64), draw.size(64, 128, 200), draw.choice([2, 3, 4, 5]), G * R
    dtype, C, low, high = draw.dtype(interpreter=True), H * P + 2 * G * N, *draw.choice([(0.0, math.inf), (0.3, 0.9)])
    rows = draw.randn(B, H * P + C + H)
    rows[:, -H:] *= 6
    ssm = draw.magnitude(-8, 8) * draw.randn(B, H, P, N)
    past, weight, bias = draw.randn(B, W - 1, C).to(dtype), draw.randn(C, W).to(dtype), draw.randn(C).to(dtype)
    per_head = (draw.randn(H) - 3, 3 * draw.rand(H), draw.randn(H))
    starts = draw.rand(B) < 0.5 if draw.chance(0.5) else None
    if starts is not None:
        ssm[starts], past[starts] = math.nan, math.inf
    order = draw.choice([(0, 1, 2, 3), (3, 1, 0, 2), (0, 2, 1, 3), (1, 0, 3, 2)])
    back = [order.index(i) for i in range(4)]
    state = ssm.permute(order).contiguous().permute(back).to(draw.device)
    given = [draw.laid(rows.to(dtype).to(draw.device)), *(t.to(draw.device) for t in (past, weight, bias, *per_head))]
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
    computed = mamba2_step(*(*given, state, fresh, G, low, high), in_place=in_place)
    assert not in_place or computed[2] is state
    return compared(
        ("y", "past", "ssm"),
        computed,
        wanted,
        loop,
        f"B {B}, H {H}, P {P}, G {G}, N {N}, W {W}, {dtype}, order {order}",
        5.0,
        draw.within(dtype),
    )


def cell_token(draw: Draw) -> Answers:
    """One token of a nonlinear cell, with a bias that may be narrower than the weights."""
    cell = load_cell(draw.choice(diagonal()))
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
        computed = parallel_rnn_step(cell, pre, rec, h, bias)
        return compared(
            ("state",),
            (computed,),
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
    return compared(("out", "past"), (out, past), wanted, loop, f"B {B}, N {N}, K {K}, {dtype}, {options}", 4.0)


def fused_recurrences(draw: Draw) -> Answers:
    """The recurrences of the fused decoding step: Mamba-2's, or a cell's with its projection head by head. Kernels only."""
    B = draw.choice([1, 2, 8])
    if draw.chance(0.5):
        G, R, P, N = draw.choice([1, 2]), draw.choice([1, 3]), draw.size(40, 64), draw.size(64, 128)
        H = G * R
        row = draw.randn(B, H * P + 2 * G * N + H)
        row[:, -H:] *= 6
        per_head = (draw.randn(H) - 3, 3 * draw.rand(H), draw.randn(H))
        row, state, *moved = (t.to(draw.device) for t in (row, draw.magnitude(-8, 8) * draw.randn(B, H, P, N), *per_head))
        x, into, out, dt = row.split([H * P, G * N, G * N, H], 1)

        def exact(kind: torch.dtype) -> list[Tensor]:
            x_, i, o, d, bias, A_log, skip, h = widened((x, into, out, dt, *moved, state), kind)
            i, o = (t.unflatten(1, (G, N)).repeat_interleave(R, 1) for t in (i, o))
            step, x_ = F.softplus(d + bias, threshold=1e9 if kind == torch.float64 else 20), x_.unflatten(1, (H, P))
            h = torch.exp(-step * torch.exp(A_log))[..., None, None] * h + (step[..., None] * x_)[..., None] * i[:, :, None]
            return [((h * o[:, :, None]).sum(-1) + skip[:, None] * x_).flatten(1), h]

        wanted, loop, y = exact(torch.float64), exact(torch.float32), torch.empty(B, H * P, device=draw.device)
        bias_, A_log_, skip_ = moved
        decode_ssm(x, into, out, dt, bias_, A_log_, skip_, state, y, G, 0.0, math.inf)
        return compared(("y", "state"), (y, state), wanted, loop, f"ssm, B {B}, H {H}, P {P}, G {G}, N {N}", 4.0)
    cell = load_cell(draw.choice(diagonal()))
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
    return compared(("state",), (state,), (wanted_,), (loop_,), f"{cell.name}, B {B}, E {E}, O {O}, {dtype}", 4.0)
