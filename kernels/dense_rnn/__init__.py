"""dense_rnn: all states of a recurrence that is dense in its heads, given only its step function (a cell with a `Mat`)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dense_rnn import launch, op, reference
from kernels.parallel_rnn import with_bias
from kernels.parallel_rnn.cell import Cell, biased
from kernels.parallel_rnn.op import flat, warn_once

METHODS = ("auto", "sequential", "sliced", "triton")
PRECISIONS = ("once", "halves")
SAVES = ("states", "borders")


def dense_rnn(
    cell: Cell,
    pre_BTPD: Tensor,
    rec_RD: Tensor,
    mat_EKGK: Tensor,
    h0_BSD: Tensor | None = None,
    starts_BT: Tensor | None = None,
    *,
    bias_PD: Tensor | None = None,
    method: str = "auto",
    learner: int = 0,
    precision: str = "once",
    save: str = "states",
) -> tuple[Tensor, Tensor]:
    """Solves h_t = step(pre_t, rec, R, h_{t-1}) for all t, of E heads of K channels, D = E K.

    pre (B, T, P, D): input projections in the order of cell.pre; or (B, T, P, any, any) whose last two make D.
    rec (R, D): weights in the order of cell.rec. mat (E, K, G, K): matrices in the order of cell.mat, as (head, input, matrix, output):
    R @ h is sum_k h[k] mat[e, k, g]. bias (P, D), or None: added to the projections.
    h0 (B, S, D): states before the first step (zeros if None). starts (B, T) bool: True where a document starts and the state is zeroed first.
    Returns (emitted states (B, T, D) in pre's dtype, final states (B, S, D) in fp32, or fp64 for fp64 inputs); differentiable in pre, rec,
    mat and h0.
    method: "sequential" keeps autograd's graph of the loop; "sliced" solves over slices of time in plain torch, and differentiates
    through the solution; "triton" does so in kernels generated from the step; "auto" is "sliced" (on a GPU "triton", once its kernels
    are proven there, see launch.py) of a cell that can be lowered, and "sequential" of any other, which it says once.
    learner: the number of a layer of plans.py, whose plan is in force and which is told what the solve needed; 0: none.
    precision, of inputs in 16 bits: "once" rounds what is multiplied with the matrices to their dtype, and certifies to that; "halves" takes it in
    two halves of 16 bits, which costs a second product a step, and certifies as in fp32. Emitted states are rounded at the end.
    save: what the backward pass keeps besides inputs and emitted states: the other "states" in fp32, or "borders", those that slices of time start
    from, of which it makes the others again by one more pass.
    Raises ValueError for shapes that do not fit the cell, and for a method that cannot solve it.
    """
    (B, T, P), D = pre_BTPD.shape[:3], pre_BTPD.shape[3:].numel()
    R, G, S = len(cell.rec), len(cell.mat), len(cell.state)
    E, K = mat_EKGK.shape[:2]
    if not G:
        raise ValueError(f"Cell {cell.name} has no matrix; kernels.parallel_rnn solves it.")
    if P != len(cell.pre) or rec_RD.shape != (R, D) or mat_EKGK.shape != (E, K, G, K) or E * K != D:
        raise ValueError(
            f"Cell {cell.name} takes pre (B, T, {len(cell.pre)}, E K), rec ({R}, E K) and mat (E, K, {G}, K), not {tuple(pre_BTPD.shape)}, "
            f"{tuple(rec_RD.shape)} and {tuple(mat_EKGK.shape)}."
        )
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if save not in SAVES:
        raise ValueError(f"save is {save!r}; choose one of {', '.join(SAVES)}.")
    if not cell.lowered and method in ("sliced", "triton"):
        raise ValueError(f"method={method!r} is not possible: {cell.why_loop} Use method='sequential' or 'auto'.")
    if not cell.lowered and method == "auto" and not torch.compiler.is_compiling():
        warn_once(cell.why_loop)
    if bias_PD is not None:
        cell, rec_RD = biased(cell), with_bias(rec_RD, bias_PD)
    dtype = reference.compute_dtype(pre_BTPD)
    h0 = torch.zeros(B, S, D, dtype=dtype, device=pre_BTPD.device) if h0_BSD is None else h0_BSD.to(dtype)
    if h0.shape != (B, S, D):
        raise ValueError(f"h0 must be {(B, S, D)}, not {tuple(h0.shape)}.")
    if starts_BT is not None and (starts_BT.shape != (B, T) or starts_BT.dtype != torch.bool):
        raise ValueError(f"starts must be bool of shape {(B, T)}, not {starts_BT.dtype} of {tuple(starts_BT.shape)}.")
    if B * T * D == 0:
        nothing = 0 * (pre_BTPD.sum() + rec_RD.sum().to(pre_BTPD.dtype) + mat_EKGK.sum().to(pre_BTPD.dtype))  # gradients of zero, not none
        return pre_BTPD.new_zeros((B, T, D)) + nothing, h0
    if method != "sequential" and cell.lowered:
        halves = precision == "halves" and pre_BTPD.element_size() == 2
        emitted, _, final = op.solve(
            pre_BTPD, rec_RD, mat_EKGK, h0, starts_BT, cell.key, method, learner, halves, save == "borders" and S > 1
        )
        return emitted.to(pre_BTPD.dtype), final
    return _loop(cell, pre_BTPD, rec_RD, mat_EKGK, h0, starts_BT)


@torch._disable_dynamo  # torch.compile would write every step of the loop out
def _loop(
    cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, mat_EKGK: Tensor, h0_BSD: Tensor, starts_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(emitted, final) by the loop, in the dtype of the arithmetic."""
    dtype = h0_BSD.dtype
    with torch.autocast(pre_BTPD.device.type, enabled=False):
        states, final = reference.sequential(cell, flat(pre_BTPD).to(dtype), rec_RD.to(dtype), mat_EKGK.to(dtype), h0_BSD, starts_BT)
    return states[:, :, -1].to(pre_BTPD.dtype), final


def dense_rnn_step(cell: Cell, pre_BPD: Tensor, rec_RD: Tensor, mat_EKGK: Tensor, h_BSD: Tensor, bias_PD: Tensor | None = None) -> Tensor:
    """One decoding step: the new states (B, S, D) in the dtype of h."""
    if bias_PD is not None:
        cell, rec_RD = biased(cell), with_bias(rec_RD, bias_PD)
    dtype = reference.compute_dtype(pre_BPD)
    with torch.autocast(pre_BPD.device.type, enabled=False):
        mat = reference.matrices(mat_EKGK.to(dtype))
        new = cell(pre_BPD.to(dtype).unbind(1), rec_RD.to(dtype).unbind(0), h_BSD.to(dtype).unbind(1), mat)
    return torch.stack(new, 1).to(h_BSD.dtype)


def last_report() -> dict[str, float]:
    """What solves by the kernels over several slices did since the last call (kernels/dense_rnn/launch.py). Waits for the device: call it
    when logging."""
    return launch.last_report()
