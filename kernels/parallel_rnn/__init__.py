"""parallel_rnn: all states of a diagonal nonlinear recurrence, given only its step function."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.parallel_rnn import reference
from kernels.parallel_rnn.cell import Cell

METHODS = ("auto", "sequential", "parallel")


def parallel_rnn(
    cell: Cell, pre_BTPD: Tensor, rec_RD: Tensor, h0_BSD: Tensor | None = None, starts_BT: Tensor | None = None, *, method: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Solves h_t = step(pre_t, rec, h_{t-1}) for all t.

    pre (B, T, P, D): input projections in the order of cell.pre. rec (R, D): weights in the order of cell.rec. h0 (B, S, D): states before
    the first step (zeros if None). starts (B, T) bool: True where a document starts and the state is zeroed first.
    Returns (states (B, T, S, D) in pre's dtype, final (B, S, D) in fp32, or fp64 for fp64 inputs); differentiable in pre, rec and h0.
    method: "sequential" keeps autograd's graph of the loop, "parallel" solves over time slices and differentiates through the
    solution, "auto" is "parallel" with as many slices as pay on the device (one on a CPU that the batch already fills).
    Raises ValueError for shapes that do not fit the cell.
    """
    B, _, P, D = pre_BTPD.shape
    R, S = len(cell.rec), len(cell.state)
    if P != len(cell.pre) or rec_RD.shape != (R, D):
        raise ValueError(f"Cell {cell.name} takes pre (B, T, {len(cell.pre)}, D) and rec ({R}, D), not {tuple(pre_BTPD.shape)} and {tuple(rec_RD.shape)}.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    dtype = reference.compute_dtype(pre_BTPD)
    h0 = torch.zeros(B, S, D, dtype=dtype, device=pre_BTPD.device) if h0_BSD is None else h0_BSD.to(dtype)
    if h0.shape != (B, S, D):
        raise ValueError(f"h0 must be {(B, S, D)}, not {tuple(h0.shape)}.")
    run = reference.sequential if method == "sequential" else reference.parallel
    with torch.autocast(pre_BTPD.device.type, enabled=False):
        states, final = run(cell, pre_BTPD.to(dtype), rec_RD.to(dtype), h0, starts_BT)
    return states.to(pre_BTPD.dtype), final


def parallel_rnn_step(cell: Cell, pre_BPD: Tensor, rec_RD: Tensor, h_BSD: Tensor) -> Tensor:
    """One decoding step: the new states (B, S, D) in the dtype of h."""
    dtype = reference.compute_dtype(pre_BPD)
    new = cell(pre_BPD.to(dtype).unbind(1), rec_RD.to(dtype).unbind(0), h_BSD.to(dtype).unbind(1))
    return torch.stack(new, 1).to(h_BSD.dtype)
