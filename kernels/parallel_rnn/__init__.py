"""parallel_rnn: all states of a diagonal nonlinear recurrence, given only its step function."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import planned
from kernels.parallel_rnn import launch, op, reference
from kernels.parallel_rnn.cell import Cell, biased, planned_loop

METHODS = ("auto", "sequential", "parallel", "triton")
SAVES = ("states", "borders")


def with_bias(rec_RD: Tensor, bias_PD: Tensor) -> Tensor:
    """Weights and biases (R + P, D) for the cell `biased`, in the wider dtype of the two: a bias of 16 bits must not round weights of 32."""
    dtype = torch.promote_types(rec_RD.dtype, bias_PD.dtype)
    return torch.cat([rec_RD.to(dtype), bias_PD.to(dtype)])


def parallel_rnn(
    cell: Cell,
    pre_BTPD: Tensor,
    rec_RD: Tensor,
    h0_BSD: Tensor | None = None,
    starts_BT: Tensor | None = None,
    *,
    bias_PD: Tensor | None = None,
    method: str = "auto",
    emitted: bool = False,
    save: str = "states",
) -> tuple[Tensor, Tensor]:
    """Solves h_t = step(pre_t, rec, h_{t-1}) for all t.

    pre (B, T, P, D): input projections in the order of cell.pre; or (B, T, P, E, K) with D = E K, in any layout whose last dimension is
    dense (a block-diagonal projection makes (E, B, T, P, K), which is read as it lies). rec (R, D): weights in the order of cell.rec.
    bias (P, D), or None: added to the projections.
    h0 (B, S, D): states before the first step (zeros if None). starts (B, T) bool: True where a document starts and the state is zeroed first.
    Returns (states (B, T, S, D) in pre's dtype, final (B, S, D) in fp32, or fp64 for fp64 inputs); differentiable in pre, rec and h0. With
    `emitted` the last state alone instead of all, (B, T, D), which spares a copy where S > 1.
    method: "sequential" keeps autograd's graph of the loop; "parallel" solves over time slices in plain torch and differentiates through the
    solution; "triton" runs the kernels generated from the step; "auto" is "triton" on a GPU, else "parallel", of a cell that can be lowered, and
    "sequential" of any other, which it says once: what cannot be followed may reach another channel, row or time.
    save: what the backward pass keeps besides the inputs: "states", or "borders", every 32nd state, from which it makes the others again.
    Raises ValueError for shapes that do not fit the cell, and for a method that cannot solve it.
    """
    (B, T, P), D = pre_BTPD.shape[:3], pre_BTPD.shape[3:].numel()
    R, S = len(cell.rec), len(cell.state)
    if P != len(cell.pre) or rec_RD.shape != (R, D):
        raise ValueError(
            f"Cell {cell.name} takes pre (B, T, {len(cell.pre)}, D) and rec ({R}, D), not {tuple(pre_BTPD.shape)} and {tuple(rec_RD.shape)}."
        )
    if method not in METHODS or save not in SAVES:
        raise ValueError(f"method is {method!r} and save {save!r}; choose one of {', '.join(METHODS)}, and one of {', '.join(SAVES)}.")
    if not cell.lowered and method in ("parallel", "triton"):
        raise ValueError(f"method={method!r} is not possible: {cell.why_loop} Use method='sequential' or 'auto'.")
    if not cell.lowered and method == "auto" and not torch.compiler.is_compiling():
        op.warn_once(cell.why_loop)
    if bias_PD is not None:
        cell, rec_RD = biased(cell), with_bias(rec_RD, bias_PD)
    dtype = reference.compute_dtype(pre_BTPD)
    h0 = torch.zeros(B, S, D, dtype=dtype, device=pre_BTPD.device) if h0_BSD is None else h0_BSD.to(dtype)
    if h0.shape != (B, S, D):
        raise ValueError(f"h0 must be {(B, S, D)}, not {tuple(h0.shape)}.")
    if starts_BT is not None and (starts_BT.shape != (B, T) or starts_BT.dtype != torch.bool):
        raise ValueError(f"starts must be bool of shape {(B, T)}, not {starts_BT.dtype} of {tuple(starts_BT.shape)}.")
    if B * T * D == 0:
        nothing = 0 * (pre_BTPD.sum() + rec_RD.sum().to(pre_BTPD.dtype))  # for autograd: gradients of zero, not none
        return pre_BTPD.new_zeros((B, T, D) if emitted else (B, T, S, D)) + nothing, h0
    if method != "sequential" and cell.lowered:
        out, kept, final, _ = op.solve(pre_BTPD, rec_RD, h0, starts_BT, cell.key, method, save == "borders")
        return out if emitted else op.joined(out, kept), final
    states, final = _loop(cell, pre_BTPD, rec_RD, h0, starts_BT)
    states = states.to(pre_BTPD.dtype)
    return states[:, :, -1] if emitted else states, final


@torch._disable_dynamo  # torch.compile would write every step of the loop out
def _loop(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """(states, final) by the loop, in the dtype of the arithmetic."""
    dtype = h0_BSD.dtype
    with torch.autocast(pre_BTPD.device.type, enabled=False):
        pre, rec = op.flat(pre_BTPD).to(dtype), rec_RD.to(dtype)
        return (planned_loop if planned() else reference.sequential)(cell, pre, rec, h0_BSD, starts_BT)


def solved(cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(emitted (B, T, D), kept (B, T, S - 1, D), final (B, S, D)) of `parallel_rnn`, in parts as the kernels leave them; T >= 1."""
    if cell.lowered:
        return op.solve(pre_BTPD, rec_RD, h0_BSD, starts_BT, cell.key, "auto", False)[:3]
    states, final = parallel_rnn(cell, pre_BTPD, rec_RD, h0_BSD, starts_BT)
    return states[:, :, -1], states[:, :, :-1], final


def parallel_rnn_step(cell: Cell, pre_BPD: Tensor, rec_RD: Tensor, h_BSD: Tensor, bias_PD: Tensor | None = None) -> Tensor:
    """One decoding step: the new states (B, S, D) in the dtype of h."""
    if bias_PD is not None:
        cell, rec_RD = biased(cell), with_bias(rec_RD, bias_PD)
    if (
        cell.lowered
        and pre_BPD.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and op.use_triton(cell, pre_BPD, "auto")
    ):
        with torch.cuda.device_of(pre_BPD):
            return launch.step(cell, pre_BPD, rec_RD, h_BSD)
    dtype = reference.compute_dtype(pre_BPD)
    new = cell(pre_BPD.to(dtype).unbind(1), rec_RD.to(dtype).unbind(0), h_BSD.to(dtype).unbind(1))
    return torch.stack(new, 1).to(h_BSD.dtype)


@torch.no_grad()
def adjoint(
    cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None, states: tuple[Tensor, Tensor],
    d_emitted_BTD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient (B, S, D) of h0 from that of the emitted states alone, the product J_T ... J_1 of the Jacobians of all steps (B, S, S, D), what
    a change of some earlier state by its own size would be at the end (B, S, D)), in the dtype of the arithmetic, at the solved `states`
    (emitted (B, T, D), kept (B, T, S - 1, D)). One pass; a reset makes the product zero. The product is what a change of h0 does to the
    final state, to first order; an adjoint g of the final state adds product^T g to that of h0."""
    if not cell.lowered:
        raise ValueError(f"There is no product of Jacobians: {cell.why_loop}")
    emitted, kept = states
    if op.use_triton(cell, pre_BTPD, "auto"):
        with torch.cuda.device_of(pre_BTPD):
            return launch.adjoint(cell, pre_BTPD, rec_RD, h0_BSD, starts_BT, emitted, kept, d_emitted_BTD)
    dtype = reference.compute_dtype(pre_BTPD)
    all_states, h0 = op.joined(emitted, kept).to(dtype), h0_BSD.to(dtype)
    before = reference.previous(all_states, h0, starts_BT)
    J = reference.jacobian(cell, op.flat(pre_BTPD).to(dtype), rec_RD.to(dtype), before, starts_BT)
    d_states = torch.zeros_like(all_states)
    if d_emitted_BTD is not None:
        d_states[:, :, -1] = d_emitted_BTD
    start = reference.adjoints(J, d_states, torch.zeros_like(h0), starts_BT)[1]
    return start, reference.product(J[:, None])[:, 0], reference.remainder(J[:, None], before[:, None])[:, 0]


def last_report() -> dict[str, float]:
    """What forward solves over several slices did since the last call: tiles solved, most corrections, residual at the slice borders, and the
    shares walked in order, forward and backward. Waits for the device: call it when logging."""
    return launch.last_report()
