"""The custom ops everywhen::parallel_rnn and its backward: one name for torch.compile, autocast and activation checkpointing, whatever
solves underneath. Saved for backward are the inputs and the states, in the dtype of pre.

Legend: B batch, T time, P input projections, R recurrent weights, S states, D channels.
"""

import functools
import warnings
from typing import Any, Optional

import torch
from torch import Tensor

from kernels.parallel_rnn import launch, reference
from kernels.parallel_rnn.cell import REGISTRY, Cell

# ruff: noqa: UP045  (the schema of a custom op is read from these annotations)


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


@torch.library.custom_op("everywhen::parallel_rnn", mutates_args=())
def solve(pre: Tensor, rec: Tensor, h0: Tensor, starts: Optional[Tensor], key: str, method: str) -> tuple[Tensor, Tensor]:
    """(states (B, T, S, D) in the dtype of pre, final (B, S, D) in the dtype of the arithmetic), T >= 1."""
    cell = REGISTRY[key]
    if use_triton(cell, pre, method):
        with torch.cuda.device_of(pre):  # Triton launches on the current device
            return launch.forward(cell, pre, rec, h0, starts)
    dtype = reference.compute_dtype(pre)
    launch._report.clear()
    with torch.autocast(pre.device.type, enabled=False):
        states = reference.solve(cell, pre.to(dtype), rec.to(dtype), h0.to(dtype), starts)
    return states.to(pre.dtype).contiguous(), states[:, -1].clone()


@solve.register_fake
def _(pre: Tensor, rec: Tensor, h0: Tensor, starts: Optional[Tensor], key: str, method: str) -> tuple[Tensor, Tensor]:
    B, T, _, D = pre.shape
    S = h0.shape[1]
    return pre.new_empty(B, T, S, D), pre.new_empty(B, S, D, dtype=reference.compute_dtype(pre))


@torch.library.custom_op("everywhen::parallel_rnn_backward", mutates_args=())
def solve_backward(
    pre: Tensor, rec: Tensor, h0: Tensor, starts: Optional[Tensor], states: Tensor, d_states: Tensor, d_final: Tensor, key: str, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre, rec and h0, each in the dtype of its tensor."""
    cell = REGISTRY[key]
    if use_triton(cell, pre, method):
        with torch.cuda.device_of(pre):
            d_pre, d_rec, d_h0 = launch.backward(cell, pre, rec, h0, starts, states, d_states, d_final)
    else:
        dtype = reference.compute_dtype(pre)
        x, w, h, y, dy, dh = (t.to(dtype) for t in (pre, rec, h0, states, d_states, d_final))
        with torch.autocast(pre.device.type, enabled=False):
            d_pre, d_rec, d_h0 = reference.linear_backward(cell, x, w, h, starts, y, dy, dh)
    return d_pre.to(pre.dtype).contiguous(), d_rec.to(rec.dtype).contiguous(), d_h0.to(h0.dtype).clone(memory_format=torch.contiguous_format)


@solve_backward.register_fake
def _(
    pre: Tensor, rec: Tensor, h0: Tensor, starts: Optional[Tensor], states: Tensor, d_states: Tensor, d_final: Tensor, key: str, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (pre, rec, h0))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    pre, rec, h0, starts, ctx.key, ctx.method = inputs
    ctx.save_for_backward(pre, rec, h0, starts, output[0])


def _differentiate(ctx: Any, d_states: Tensor, d_final: Tensor) -> tuple[Any, ...]:
    return (*solve_backward(*ctx.saved_tensors, d_states, d_final, ctx.key, ctx.method), None, None, None)


solve.register_autograd(_differentiate, setup_context=_save)
