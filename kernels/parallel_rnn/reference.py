"""Plain torch solvers of h_t = step(pre_t, rec, h_{t-1}); they run on any device and in float64, and are the oracle of the kernels.

`sequential` is the loop under autograd, the definition itself. `parallel` cuts time into slices that are walked side by side (multiple
shooting): only the state at the start of each slice is unknown. A pass from guessed starts gives every slice's end and the product of its
Jacobians; a scan over the slices corrects the starts (one Newton step); the pass is repeated until a correction is too small a part of what
earlier states left there to count (`share`). Correction k makes the first k slices exact, so it ends after at most as many corrections as slices.

The backward pass differentiates through the solution: with the Jacobians J_t at the known states, the adjoint
g_{t-1} = J_t^T g_t + dL/dh_{t-1} is one linear recurrence backwards in time, solved over the same slices, and all parameter gradients
follow from one vector-Jacobian product over all steps at once (arXiv 2510.21450, section 2.6). Saved are inputs and states only.

Legend: B batch, T time, N slices, L steps a slice, P input projections, R recurrent weights, S states, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.parallel_rnn.cell import Cell
from kernels.parallel_rnn.expressions import jumps, torch_functions

# A gap at a slice's border may be this much of what a change of some earlier state by its own size would be there: the recurrence cannot tell
# it from such a relative change of that state. Likewise adjoints. For 16-bit inputs a twentieth of their unit roundoff, 2^-8 and 2^-11.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.5e-5, torch.bfloat16: 2e-4}


def tolerance(cell: Cell, dtype: torch.dtype) -> float:
    """TOLERANCE, but of a lowered cell that may jump (it compares states) none: there a small change has no small effect."""
    return 0.0 if jumps(cell) else TOLERANCE[dtype]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Arithmetic inside a solve: fp64 for fp64 inputs, fp32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sequential(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(states (B, T, S, D), final (B, S, D)) by the loop; autograd flows through every step. Arguments in the dtype of the arithmetic."""
    state = h0_BSD.unbind(1)
    rec = rec_RD.unbind(0)
    out = []
    for t in range(pre_BTPD.shape[1]):
        if starts_BT is not None:
            state = tuple(zeroed(s, starts_BT[:, t, None]) for s in state)
        state = tuple(cell(pre_BTPD[:, t].unbind(1), rec, state))
        out.append(torch.stack(state, 1))
    states_BTSD = torch.stack(out, 1) if out else pre_BTPD.new_zeros(pre_BTPD.shape[0], 0, len(cell.state), pre_BTPD.shape[-1])
    return states_BTSD, torch.stack(state, 1)


def zeroed(tensor: Tensor, where: Tensor) -> Tensor:
    """Zero where a document starts; selected, not multiplied, so that neither NaN nor infinity gets into the next document."""
    return torch.where(where, torch.zeros((), dtype=tensor.dtype, device=tensor.device), tensor)


def previous(states_BTSD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> Tensor:
    """The state each step started from: the one before it, h0 at the first, zero where a document starts."""
    before = torch.cat([h0_BSD[:, None], states_BTSD[:, :-1]], 1)
    return before if starts_BT is None else zeroed(before, starts_BT[:, :, None, None])


@dataclass
class Report:
    """What the last call of `parallel` did: corrections made, and the largest `share` of what a further one would have changed."""

    slices: int = 1
    corrections: int = 0
    residual: float = 0.0


last_report = Report()


def choose_slices(B: int, T: int, D: int, device: torch.device) -> int:
    """Slices for a plain torch solve: as many as fill an operation (one on under some 8,000 elements costs a CPU as much as one on none),
    of at least 32 steps; fewer than four do not repay the corrections, then it is the plain loop (one slice)."""
    room = (1 << 13 if device.type == "cpu" else 1 << 18) // max(1, B * D)
    slices = min(room, T // 32, 64)
    return slices if slices >= 4 else 1


def slice_time(tensor: Tensor, n: int, length: int) -> Tensor:
    """(B, T, ...) -> (B, N, L, ...), zeros after the end."""
    pad = n * length - tensor.shape[1]
    if pad:
        tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], pad, *tensor.shape[2:])], 1)
    return tensor.unflatten(1, (n, length))


def walk(cell: Cell, pre_BNLPD: Tensor, rec_RD: Tensor, start_BNSD: Tensor, starts_BNL: Tensor | None) -> Tensor:
    """States (B, N, L, S, D) of all slices from the given start states."""
    out = pre_BNLPD.new_empty(*pre_BNLPD.shape[:3], *start_BNSD.shape[2:])
    rec, state = rec_RD.unbind(0), start_BNSD.unbind(2)
    for t in range(pre_BNLPD.shape[2]):
        if starts_BNL is not None:
            state = tuple(zeroed(s, starts_BNL[:, :, t, None]) for s in state)
        state = tuple(cell(pre_BNLPD[:, :, t].unbind(2), rec, state))
        for i, s in enumerate(state):
            out[:, :, t, i] = s
    return out


def product(J_BNLSSD: Tensor) -> Tensor:
    """J_L ... J_2 J_1 of every slice, (B, N, S, S, D)."""
    if J_BNLSSD.shape[-2] == 1:
        return J_BNLSSD.prod(2)
    J = J_BNLSSD
    while J.shape[2] > 1:  # pairs of neighbours, later on the left
        odd = J[:, :, J.shape[2] & ~1 :]
        later, earlier = J[:, :, 1::2, :, :, None], J[:, :, 0 : J.shape[2] & ~1 : 2, None]
        pairs = (later * earlier).sum(4)  # over the states between; S is small, and a product of matrices per channel costs ten launches
        J = torch.cat([pairs, odd], 2) if odd.shape[2] else pairs
    return J[:, :, 0]


def corrected(end_BNSD: Tensor, product_BNSSD: Tensor, start_BNSD: Tensor) -> Tensor:
    """New slice starts: start_{n+1} = end_n + P_n (new start_n - start_n). Where a start did not change, or the product is not finite, the
    end itself, so that every correction makes one more slice exact whatever the Jacobians are."""
    new = [start_BNSD[:, 0]]
    for n in range(start_BNSD.shape[1] - 1):
        change = new[-1] - start_BNSD[:, n]
        step = (product_BNSSD[:, n] * change[:, None]).sum(2)
        same = (change == 0).all(1, keepdim=True) | ~torch.isfinite(step).all(1, keepdim=True)
        new.append(torch.where(same, end_BNSD[:, n], end_BNSD[:, n] + step))
    return torch.stack(new, 1)


def remainder(J_BNLSSD: Tensor, before_BNLSD: Tensor) -> Tensor:
    """What a change of some state of a slice by its own size would be at the slice's end, (B, N, S, D): the largest absolute product of
    Jacobians from there times the state. before: the states that steps start from."""
    J, left = J_BNLSSD.abs(), before_BNLSD.abs()
    if J.shape[3] == 1:
        return (J[:, :, :, 0].flip(2).cumprod(2).flip(2) * left).amax(2)
    total = left[:, :, 0]
    for t in range(J.shape[2]):
        total = (J[:, :, t] * torch.maximum(total, left[:, :, t])[:, :, None]).amax(3)
    return total


def remainders(product_BNSSD: Tensor, own_BNSD: Tensor) -> Tensor:
    """Of every slice's end what a change of some state of this slice or an earlier one would be, given `remainder` of each: (B, N, S, D)."""
    total = [own_BNSD[:, 0]]
    for n in range(1, own_BNSD.shape[1]):
        total.append(torch.maximum((product_BNSSD[:, n].abs() * total[-1][:, None]).amax(2), own_BNSD[:, n]))
    return torch.stack(total, 1)


def share(change: Tensor, size: Tensor) -> float:
    """The largest share that a change is of a size: what the certificate asks for. No change is no share of anything; any other
    is too large a share of a size that is not finite, as where a product overflowed."""
    found = torch.where(change == 0, 0.0, torch.where(torch.isfinite(size), change.abs() / size, torch.inf))
    return float(found.nan_to_num(nan=torch.inf).max()) if found.numel() else 0.0


def solve(cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, slices: int | None = None) -> Tensor:
    """All states (B, T, S, D) by multiple shooting, without a graph."""
    global last_report
    B, T, _, D = pre.shape
    n = max(1, min(slices or choose_slices(B, T, D, pre.device), T))
    length = -(-T // n)
    n = -(-T // length)
    starts_N = None if starts is None else slice_time(starts, n, length)
    pre_N = slice_time(pre, n, length)
    start = torch.cat([h0[:, None], h0.new_zeros(B, n - 1, *h0.shape[1:])], 1)
    for corrections in range(n):
        states = walk(cell, pre_N, rec, start, starts_N)
        if n == 1:
            last_report = Report()
            break
        before = torch.cat([start[:, :, None], states[:, :, :-1]], 2)
        before = before if starts_N is None else zeroed(before, starts_N[..., None, None])
        J = jacobian(cell, pre_N, rec, before, starts_N)
        if n * length > T:  # what is walked after the end counts for nothing
            J[:, -1, T - n * length :] = torch.eye(J.shape[3], dtype=J.dtype, device=J.device)[:, :, None]
        P = product(J)
        new = corrected(states[:, :, -1], P, start)
        residual = share((new - start)[:, 1:], remainders(P, torch.maximum(remainder(J, before), states[:, :, -1].abs()))[:, :-1])
        last_report = Report(n, corrections, residual)
        if residual <= tolerance(cell, pre.dtype):
            break
        start = new
    else:  # as many corrections as slices: the starts are now the sequential ones
        states = walk(cell, pre_N, rec, start, starts_N)
    return states.flatten(1, 2)[:, :T]


class _Parallel(torch.autograd.Function):
    """Forward by multiple shooting without a graph, backward by one reversed linear recurrence."""

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, slices: int | None
    ) -> tuple[Tensor, Tensor]:
        states = solve(cell, pre, rec, h0, starts, slices)
        ctx.save_for_backward(pre, rec, h0, states, *(() if starts is None else (starts,)))
        ctx.cell, ctx.slices = cell, slices
        return states, states[:, -1].clone() if pre.shape[1] else h0.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        pre, rec, h0, states, *rest = ctx.saved_tensors
        d_states, d_final = gradients
        starts = rest[0] if rest else None
        return (None, *linear_backward(ctx.cell, pre, rec, h0, starts, states, d_states, d_final, ctx.slices), None, None)


def jacobian(cell: Cell, pre: Tensor, rec_RD: Tensor, before: Tensor, starts: Tensor | None = None) -> Tensor:
    """d state_i / d previous state_j of a lowered cell for every step and channel: pre (..., P, D), before (..., S, D) -> (..., S, S, D) as
    [i, j]; zero where a document starts."""
    state = before.unbind(-2)
    entries = [entry.expand_as(state[0]) for entry in torch_functions(cell)[0](*pre.unbind(-2), *rec_RD.unbind(0), *state)]
    J = torch.stack(entries, -2).unflatten(-2, (len(state), len(state)))
    return J if starts is None else zeroed(J, starts[..., None, None, None])


def adjoints(J: Tensor, d_states: Tensor, d_final: Tensor, starts: Tensor | None, slices: int | None = None) -> tuple[Tensor, Tensor]:
    """g_t = dL/dh_t + J_{t+1}^T g_{t+1} for all t, and J_1^T g_1. One sweep over slices from zero, a scan, one sweep from the true values. The
    scan's products may over- or underflow where the sweep does not: what comes out of every slice has to be what the scan gave the slice
    before it, but for a small share of what a change of some later adjoint by its own size would be there, or all is swept once more in one
    piece."""
    B, T, S, D = d_states.shape
    n = max(1, min(slices or choose_slices(B, T, D, J.device), T))
    length = -(-T // n)
    n = -(-T // length)
    J_N, d_N = slice_time(J, n, length), slice_time(d_states, n, length)
    starts_N = None if starts is None else slice_time(starts, n, length)
    if n * length > T:  # steps after the end pass the adjoint on unchanged
        J_N[:, -1, T - n * length :] = torch.eye(S, dtype=J.dtype, device=J.device)[:, :, None]
    carried = torch.cat([d_states.new_zeros(B, n - 1, S, D), d_final[:, None]], 1)

    def sweep(carried: Tensor, out: Tensor | None) -> Tensor:
        for t in range(length - 1, -1, -1):
            total = d_N[:, :, t] + carried
            if out is not None:
                out[:, :, t] = total
            carried = J_N[:, :, t, 0] * total if S == 1 else (J_N[:, :, t] * total[:, :, :, None]).sum(2)
            carried = carried if starts_N is None else zeroed(carried, starts_N[:, :, t, None, None])
        return carried

    if n > 1:
        ends, P = sweep(carried, None), product(J_N)
        passed, change = [carried[:, -1]], ends[:, -1]
        for i in range(n - 2, -1, -1):
            passed.append(change)
            change = ends[:, i] + (P[:, i] * change[:, :, None]).sum(1)
        carried = torch.stack(passed[::-1], 1)
    out = torch.empty_like(d_N)
    left = sweep(carried, out)
    if n > 1:
        backwards = J_N.flip(1, 2).transpose(3, 4)
        sizes = remainders(P.flip(1).transpose(2, 3), remainder(backwards, out.flip(1, 2))).flip(1)[:, 1:]
        if share(left[:, 1:] - carried[:, :-1], sizes) > 10 * TOLERANCE[J.dtype]:
            return adjoints(J, d_states, d_final, starts, 1)
    return out.flatten(1, 2)[:, :T], left[:, 0]


def linear_backward(
    cell: Cell,
    pre: Tensor,
    rec: Tensor,
    h0: Tensor,
    starts: Tensor | None,
    states: Tensor,
    d_states: Tensor,
    d_final: Tensor,
    slices: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre, rec and h0 given those of all states and of the final one."""
    if not pre.shape[1]:
        return torch.zeros_like(pre), torch.zeros_like(rec), d_final
    before = previous(states, h0, starts)
    with torch.no_grad():
        J = jacobian(cell, pre, rec, before, starts)
        adjoint, d_h0 = adjoints(J, d_states, d_final, starts, slices)
    d_pre, d_rec = step_gradients(cell, pre, rec, before, adjoint)
    return d_pre, d_rec, d_h0


def step_gradients(cell: Cell, pre: Tensor, rec: Tensor, before: Tensor, adjoint: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of pre and rec of all steps of a lowered cell at once, given dL/d(new state) of each step."""
    P, state = pre.unbind(2), before.unbind(2)
    found = torch_functions(cell)[1](*P, *rec.unbind(0), *state, *adjoint.unbind(2))
    d_pre = torch.stack([d.expand_as(state[0]) for d in found[: len(P)]], 2)
    d_rec = [d.expand_as(state[0]).sum((0, 1)) for d in found[len(P) : len(P) + rec.shape[0]]]
    return d_pre, torch.stack(d_rec) if d_rec else torch.zeros_like(rec)


def parallel(
    cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None, *, slices: int | None = None
) -> tuple[Tensor, Tensor]:
    """Same values as `sequential`; the backward pass keeps no graph of the loop. slices: None lets the sizes decide."""
    states, final = _Parallel.apply(cell, pre_BTPD, rec_RD, h0_BSD, starts_BT, slices)
    return states, final
