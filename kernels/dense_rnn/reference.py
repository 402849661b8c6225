"""Plain torch solvers of h_t = step(pre_t, rec, R, h_{t-1}) where R are dense matrices over the channels of a head; the oracle of the kernels.

`sequential` is the loop under autograd, the definition itself. `solve` cuts time into slices that are walked side by side, as rows of one
matrix product a step. Only the states at slice starts are unknown. They come from a burn-in (each slice starts BURN_IN steps early, from
zero) and from quasi-Newton corrections: the new start of a slice is the end of the one before it, and what a change of that one's start does
to it by the *diagonal* part of the Jacobian alone, products with R held constant. What the matrices carry over is left to the repetition.

The certificate is a backward error: a solve is right where every start is the end of the slice before it but for a small share of that
channel's own size in that slice (`TOLERANCE`). Correction k makes the first k slices exact, so that after as many as there are slices it is
the walk in order. The adjoint g_{t-1} = J_t^T g_t + dL/dh_{t-1} is linear and takes the same three devices backwards, with R transposed; it
is certified against its own size.

Legend: B batch, T time, N slices, L steps a slice, P input projections, R recurrent weights, G matrices, S states, D = E K channels in E
heads; mat (E, K, G, K) as (head, input, matrix, output).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.products import InTorch, in_torch, transposed
from kernels.parallel_rnn.reference import compute_dtype, corrected, previous, product, share, slice_time, zeroed
from kernels.parallel_rnn.step import HeadMatrix

__all__ = ["TOLERANCE", "Report", "backward", "compute_dtype", "last_report", "matrices", "sequential", "solve"]

# The largest gap at a slice's border, as a share of the channel's size: four roundings of a value as it enters the product, where it is rounded in
# every step; of fp32 some more, as slow memories add them up.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.0**-18, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
NEAR = 16  # steps before a border over which a channel's size is taken: adjoints may be far smaller there than elsewhere in a slice
BURN_IN = 32  # steps before a slice's start that its first guess is walked over


@dataclass
class Report:
    """What a solve did: slices, corrections made, and the largest share of a channel's size that a further one would have changed."""

    slices: int = 1
    corrections: int = 0
    residual: float = 0.0


last_report, last_backward = Report(), Report()


def matrices(mat_EKGK: Tensor) -> list[HeadMatrix]:
    return [HeadMatrix(R_EKJ) for R_EKJ in mat_EKGK.unbind(2)]


def sequential(
    cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, mat_EKGK: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(states (B, T, S, D), final (B, S, D)) by the loop; autograd flows through every step. Arguments in the dtype of the arithmetic."""
    state, rec, mat, out = h0_BSD.unbind(1), rec_RD.unbind(0), matrices(mat_EKGK), []
    for t in range(pre_BTPD.shape[1]):
        if starts_BT is not None:
            state = tuple(zeroed(s, starts_BT[:, t, None]) for s in state)
        state = tuple(cell(pre_BTPD[:, t].unbind(1), rec, state, mat))
        out.append(torch.stack(state, 1))
    return torch.stack(out, 1), torch.stack(state, 1)


def choose_slices(B: int, T: int, D: int, device: torch.device) -> int:
    """Slices of a solve in plain torch, as many as fill an operation; fewer than four do not repay the corrections, then it is the walk in
    order."""
    slices = min((1 << 13 if device.type == "cpu" else 1 << 20) // max(1, B * D), T // 64, 64)
    return slices if slices >= 4 else 1


def _sizes(T: int, slices: int) -> tuple[int, int]:
    """(slices, steps of each)."""
    length = -(-T // max(1, min(slices, T)))
    return -(-T // length), length


def _walk(cell: Cell, pre: Tensor, rec: Tensor, mat: list[HeadMatrix], start: Tensor, starts: Tensor | None) -> Tensor:
    """States (B, N, L, S, D) of all slices: pre (B, N, L, P, D), start (B, N, S, D), starts (B, N, L)."""
    state, weights, out = start.unbind(2), rec.unbind(0), []
    for t in range(pre.shape[2]):
        if starts is not None:
            state = tuple(zeroed(s, starts[:, :, t, None]) for s in state)
        state = tuple(cell(pre[:, :, t].unbind(2), weights, state, mat))
        out.append(torch.stack(state, 2))
    return torch.stack(out, 2)


def _early(tensor: Tensor, n: int, length: int, steps: int) -> Tensor:
    """(B, N - 1, steps, ...): the last `steps` (at most a slice's) before each slice but the first."""
    return slice_time(tensor, n, length)[:, :-1, length - steps :]


def local_size(values: Tensor, starts: Tensor | None) -> Tensor:
    """(B, N, S, D): the largest absolute value among the last NEAR steps of slices (B, N, L, S, D) that lie in their end's document."""
    size, (first, last) = values.abs(), (values.shape[2] - NEAR, values.shape[2])
    if starts is not None:
        later = starts.flip(2).cumsum(2).flip(2) - starts.to(torch.int64)  # document starts after each step
        size = zeroed(size, (later > 0)[..., None, None])
    return size[:, :, max(0, first) : last].amax(2)


def certified_size(cell: Cell, size_NSD: Tensor, limit: float) -> Tensor:
    """The sizes (..., S, D) of states that `limit` is a share of. A difference of logarithms is a share by itself, however large they are, down to what
    the roundings of fp32 leave of them."""
    if not cell.logs:
        return size_NSD
    sizes = list(size_NSD.unbind(-2))
    for i in cell.logs:
        sizes[i] = (sizes[i] * min(1.0, TOLERANCE[torch.float32] / limit)).clamp(min=1.0)
    return torch.stack(sizes, -2)


def diagonal(made: InTorch, pre: Tensor, rec: Tensor, mat: list[HeadMatrix], before: Tensor, starts: Tensor | None) -> Tensor:
    """The Jacobian's diagonal part (..., S, S, D) of every step."""
    x, w, h = pre.unbind(-2), rec.unbind(0), before.unbind(-2)
    J = torch.stack(made.jacobian(x, w, h, made.products(x, w, h, mat)[0]), -2)
    J = J.unflatten(-2, (len(h), len(h)))
    return J if starts is None else zeroed(J, starts[..., None, None, None])


def _unit_after(J_BNLSSD: Tensor, T: int) -> Tensor:
    """Steps after the end of time leave a change as it is."""
    past = T - J_BNLSSD.shape[1] * J_BNLSSD.shape[2]
    if past:
        J_BNLSSD[:, -1, past:] = torch.eye(J_BNLSSD.shape[3], dtype=J_BNLSSD.dtype, device=J_BNLSSD.device)[:, :, None]
    return J_BNLSSD


@torch.no_grad()
def solve(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, slices: int | None = None,
    burn_in: int = BURN_IN, tolerance: float | None = None,
) -> Tensor:  # fmt: skip
    """All states (B, T, S, D) of a lowered cell over slices of time."""
    global last_report
    (B, T, _, D), matrix, made = pre.shape, matrices(mat), in_torch(cell)
    n, length = _sizes(T, slices or choose_slices(B, T, D, pre.device))
    if n == 1:
        last_report = Report()
        return _walk(cell, pre[:, None], rec, matrix, h0[:, None], None if starts is None else starts[:, None])[:, 0]
    limit, steps = TOLERANCE[pre.dtype] if tolerance is None else tolerance, min(burn_in, length)
    pre_N, starts_N = slice_time(pre, n, length), None if starts is None else slice_time(starts, n, length)
    start = torch.cat([h0[:, None], h0.new_zeros(B, n - 1, *h0.shape[1:])], 1)
    if steps:
        early = None if starts is None else _early(starts, n, length, steps)
        zero = start[:, 1:].clone()
        if steps == length:
            zero[:, 0] = h0  # the first slice's own walk
        start[:, 1:] = _walk(cell, _early(pre, n, length, steps), rec, matrix, zero, early)[:, :, -1]
    for corrections in range(n):
        states = _walk(cell, pre_N, rec, matrix, start, starts_N)
        before = torch.cat([start[:, :, None], states[:, :, :-1]], 2)
        before = before if starts_N is None else zeroed(before, starts_N[..., None, None])
        P = product(_unit_after(diagonal(made, pre_N, rec, matrix, before, starts_N), T))
        end, size = states[:, :, -1], certified_size(cell, local_size(states, starts_N), limit)
        new = corrected(end, P, start)
        residual = share((new - start)[:, 1:], size[:, :-1])
        last_report = Report(n, corrections, residual)
        if residual <= limit:
            break
        start = new
    return states.flatten(1, 2)[:, :T]


def _step_back(
    made: InTorch, x: Tensor, w: Tensor, before: Tensor, p: list[Tensor], g: Tensor, back: list[HeadMatrix], starts: Tensor | None
) -> Tensor:
    """The adjoint before a step from that after it: x (..., P, D), before and g (..., S, D)."""
    values = (x.unbind(-2), w.unbind(0), before.unbind(-2), p, g.unbind(-2))
    _, q = made.d_products(*values, back)
    d_state = torch.stack(made.gradients(*values, q)[2], -2)
    return d_state if starts is None else zeroed(d_state, starts[..., None, None])


def _size_back(g: Tensor, starts: Tensor | None) -> Tensor:
    """`local_size` of adjoints at the first step of slices: among the first NEAR steps, before a document starts."""
    size = g[:, :, :NEAR].abs()
    return (size if starts is None else zeroed(size, (starts[:, :, :NEAR].cumsum(2) > 0)[..., None, None])).amax(2)


def _adjoints(
    cell: Cell, pre: Tensor, rec: Tensor, mat: list[HeadMatrix], before: Tensor, d_states: Tensor, d_final: Tensor,
    starts: Tensor | None, slices: int | None, burn_in: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(g_t of every state (B, T, S, D), the adjoint of the initial state (B, S, D))."""
    global last_backward
    (B, T, _, D), made, back = pre.shape, in_torch(cell), transposed(mat)
    n, length = _sizes(T, slices or choose_slices(B, T, D, pre.device))
    x, h, d = (slice_time(t, n, length) for t in (pre, before, d_states))
    new_document = None if starts is None else slice_time(starts, n, length)
    p = made.products(x.unbind(-2), rec.unbind(0), h.unbind(-2), mat)[0]

    def sweep(rows: slice, first: int, last: int, carried: Tensor) -> tuple[Tensor, Tensor]:
        """(g (B, rows, last - first, S, D), what leaves to the left) of steps first to last, backwards."""
        out = []
        for t in range(last - 1, first - 1, -1):
            out.append(d[:, rows, t] + carried)
            at = None if new_document is None else new_document[:, rows, t]
            step = _step_back(made, x[:, rows, t], rec, h[:, rows, t], [v[:, rows, t] for v in p], out[-1], back, at)
            inside = torch.arange(n, device=pre.device)[rows] * length + t < T  # steps after the end pass the adjoint on
            carried = torch.where(inside[:, None, None], step, carried)
        return torch.stack(out[::-1], 2), carried

    carried = torch.cat([d_states.new_zeros(B, n - 1, *d_final.shape[1:]), d_final[:, None]], 1)
    if n == 1:
        last_backward = Report()
        g, left = sweep(slice(None), 0, length, carried)
        return g[:, 0], left[:, 0]
    if burn_in:
        guess = torch.zeros_like(carried[:, 1:])
        if T - (n - 1) * length <= burn_in:  # the last slice's own sweep
            guess[:, -1] = d_final
        carried[:, :-1] = sweep(slice(1, None), 0, min(burn_in, length), guess)[1]
    P = product(_unit_after(diagonal(made, x, rec, mat, h, new_document), T)).flip(1).transpose(2, 3)
    for corrections in range(n):
        g, left = sweep(slice(None), 0, length, carried)
        new = corrected(left.flip(1), P, carried.flip(1)).flip(1)
        residual = share((new - carried)[:, :-1], _size_back(g, new_document)[:, 1:])
        last_backward = Report(n, corrections, residual)
        if residual <= TOLERANCE[pre.dtype]:
            break
        carried = new
    return g.flatten(1, 2)[:, :T], left[:, 0]


@torch.no_grad()
def backward_with_border(
    cell: Cell, pre: Tensor, rec: Tensor, mat: Tensor, h0: Tensor, starts: Tensor | None, states: Tensor, d_states: Tensor,
    d_final: Tensor, slices: int | None = None, burn_in: int = BURN_IN,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre, rec, mat and h0 at the solved states (B, T, S, D), given those of all states and of the final one; and the adjoint's
    size near the first step (B, S, D)."""
    matrix, made = matrices(mat), in_torch(cell)
    before = previous(states, h0, starts)
    g, d_h0 = _adjoints(cell, pre, rec, matrix, before, d_states, d_final, starts, slices, burn_in)
    x, w, h = pre.unbind(2), rec.unbind(0), before.unbind(2)
    p, u = made.products(x, w, h, matrix)
    d_p, q = made.d_products(x, w, h, p, g.unbind(2), transposed(matrix))
    d_pre, d_rec, _ = made.gradients(x, w, h, p, g.unbind(2), q)
    E, K = mat.shape[:2]
    d_mat = torch.zeros_like(mat)
    for (index, operand), value in zip(made.dense.products, d_p):
        left, right = (v.reshape(-1, E, K).transpose(0, 1) for v in (u[operand], value))
        d_mat[:, :, index] += left.transpose(1, 2) @ right
    sums = torch.stack([d.sum((0, 1)) for d in d_rec]) if d_rec else torch.zeros_like(rec)
    return torch.stack(d_pre, 2), sums, d_mat, d_h0, _size_back(g[:, None], None if starts is None else starts[:, None])[:, 0]


def backward(*given: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`backward_with_border` without the size."""
    return backward_with_border(*given, **options)[:4]
