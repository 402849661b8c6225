"""The op everywhen::parallel_rnn, whatever solves underneath. Saved for backward are the inputs and the states, in the dtype of pre; with `borders`
only every 32nd state, in fp32.

The state a cell emits (its last) and those it keeps to itself are two tensors, so that a layer that reads the emitted one alone neither
copies it nor brings a gradient of zeros for the others.

Legend: B batch, T time, P input projections, R recurrent weights, S states, D channels, M marks.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from kernels.op import define
from kernels.parallel_rnn import launch, reference
from kernels.parallel_rnn.cell import REGISTRY, Cell


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(reason, stacklevel=3)


def use_triton(cell: Cell, pre: Tensor, method: str) -> bool:
    """Whether the kernels run. Raises ValueError if they were asked for by name and cannot."""
    if method == "parallel" or pre.dtype == torch.float64:
        return False
    reason = launch.why_not(cell, pre.device)
    if reason and method == "triton":
        raise ValueError(f"method='triton' is not possible: {reason}")
    if reason and pre.is_cuda:
        warn_once(reason)
    return not reason and (method == "triton" or pre.is_cuda)


def flat(pre: Tensor) -> Tensor:
    """(B, T, P, E, K) as (B, T, P, D)."""
    return pre.flatten(3) if pre.dim() == 5 else pre


def parts(states: Tensor) -> tuple[Tensor, Tensor]:
    """(emitted, kept) of all states (B, T, S, D), contiguous tensors of their own."""
    return states[:, :, -1].clone(memory_format=torch.contiguous_format), states[:, :, :-1].clone(memory_format=torch.contiguous_format)


def joined(emitted: Tensor, kept: Tensor) -> Tensor:
    """All states (B, T, S, D)."""
    return torch.cat([kept, emitted[:, :, None]], 2) if kept.shape[2] else emitted[:, :, None]


def _forward(
    pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, key: str, method: str, borders: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(emitted (B, T, D) and kept (B, T, S - 1, D) in the dtype of pre, final (B, S, D) in the dtype of the arithmetic, marks (B, M, S, D));
    T >= 1. Without borders there are no marks."""
    cell = REGISTRY[key]
    if use_triton(cell, pre, method):
        emitted, kept, final, marks = launch.forward(cell, pre, rec, h0, starts, borders=borders)
        return emitted, kept, final, marks if borders else h0.new_empty(0, dtype=torch.float32)
    dtype = reference.compute_dtype(pre)
    with torch.autocast(pre.device.type, enabled=False):
        states = reference.solve(cell, flat(pre).to(dtype), rec.to(dtype), h0.to(dtype), starts)
    marks = torch.cat([states[:, launch.MARK - 1 : -1 : launch.MARK], states[:, -1:]], 1) if borders else states.new_empty(0)
    return *parts(states.to(pre.dtype)), states[:, -1].clone(), marks


def _fake(
    pre: Tensor, rec: Tensor, h0: Tensor, starts: Tensor | None, key: str, method: str, borders: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, T), S, D = pre.shape[:2], h0.shape[1], h0.shape[2]
    inner = reference.compute_dtype(pre)
    marks = h0.new_empty((B, -(-T // launch.MARK), S, D) if borders else (0,), dtype=inner)
    return pre.new_empty(B, T, D), pre.new_empty(B, T, S - 1, D), pre.new_empty(B, S, D, dtype=inner), marks


def _save(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[str, str]]:
    pre, rec, h0, starts, key, method, borders = inputs
    emitted, kept, _, marks = output
    none = marks.new_empty(0)
    return (pre, rec, h0, starts, *((none, none, marks) if borders else (emitted, kept, marks))), (key, method)


def _backward(
    d_emitted: Tensor | None, d_kept: Tensor | None, d_final: Tensor | None, d_marks: Tensor | None, pre: Tensor, rec: Tensor, h0: Tensor,
    starts: Tensor | None, emitted: Tensor, kept: Tensor, marks: Tensor, key: str, method: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of pre, rec and h0, each in the dtype of its tensor. emitted and kept are empty where the marks stand for them; nobody
    differentiates the marks."""
    cell, triton = REGISTRY[key], use_triton(REGISTRY[key], pre, method)
    dtype, borders = reference.compute_dtype(pre), marks.numel() > 0
    d_emitted = pre.new_zeros(*pre.shape[:2], h0.shape[2]) if d_emitted is None else d_emitted
    d_final = torch.zeros_like(h0) if d_final is None else d_final
    with torch.autocast(pre.device.type, enabled=False):
        if triton:
            if borders:
                emitted, kept = launch.restore(cell, pre, rec, h0, starts, marks)
            d_pre, d_rec, d_h0 = launch.backward(cell, pre, rec, h0, starts, emitted, kept, d_emitted, d_kept, d_final)
        else:
            x, w, h, dh = flat(pre).to(dtype), rec.to(dtype), h0.to(dtype), d_final.to(dtype)
            states = reference.solve(cell, x, w, h, starts) if borders else joined(emitted, kept).to(dtype)
            d_kept = torch.zeros_like(states[:, :, :-1]) if d_kept is None else d_kept.to(dtype)
            d_states = joined(d_emitted.to(dtype), d_kept)
            d_pre, d_rec, d_h0 = reference.linear_backward(cell, x, w, h, starts, states, d_states, dh)
    return (
        torch.empty_like(pre).copy_(d_pre.view(pre.shape)) if not triton else d_pre,
        d_rec.to(rec.dtype).contiguous(),
        d_h0.to(h0.dtype).clone(),
    )


def _fake_backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    pre, rec, h0 = given[4:7]
    return torch.empty_like(pre), rec.new_empty(rec.shape), h0.new_empty(h0.shape)


solve, solve_op = define("parallel_rnn", _forward, _fake, _backward, fake_backward=_fake_backward, save=_save, materialize=False)
