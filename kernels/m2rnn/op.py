"""The op everywhen::m2rnn, whatever walks underneath. Saved for backward are the inputs and the states at borders of chunks.

Legend: as in reference.py.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from kernels.m2rnn import launch, reference
from kernels.op import define


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"M2RNN is walked in plain torch, slowly. {reason}", stacklevel=3)


def use_triton(v: Tensor) -> bool:
    reason = launch.why_not(v)
    if reason and v.is_cuda and v.dtype != torch.float64:
        _warn_once(reason)
    return not reason


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(o (B, T, H, V) in v's dtype, final state (B, H, K, V) and the states (B, H, n, K, V) before chunks, none without `keep`, in the dtype of
    the arithmetic), T >= 1."""
    with torch.cuda.device_of(v), torch.autocast(v.device.type, enabled=False):  # Triton launches on the current device
        if use_triton(v):
            return launch.forward(q, k, v, g, w, h0, starts, keep)
        o, final, borders = reference.forward(q, k, v, g, w, h0, starts)
        return o.to(v.dtype), final.clone(), borders if keep else borders[:, :, :0].clone()


def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (B, T, H, V), K, inner = v.shape, q.shape[3], reference.compute_dtype(v)
    chunks = (T + reference.EVERY - 1) // reference.EVERY if keep else 0
    return v.new_empty(B, T, H, V), v.new_empty(B, H, K, V, dtype=inner), v.new_empty(B, H, chunks, K, V, dtype=inner)


def _save(inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (*inputs[:7], output[2]), ()


def _backward(
    do: Tensor, d_final: Tensor, d_borders: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None,
    starts: Tensor | None, borders: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, g, w and h0, each in the dtype of its tensor."""
    walked = launch if use_triton(v) else reference
    with torch.cuda.device_of(v), torch.autocast(v.device.type, enabled=False):
        made = walked.backward(q, k, v, g, w, starts, borders, do, d_final)
    dq, dk, dv, dg, dw, dh0 = made
    return (
        dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg.to(g.dtype), dw.to(w.dtype).contiguous(), None if h0 is None else dh0.to(h0.dtype),
    )  # fmt: skip


def _fake_backward(*given: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.new_empty(t.shape) for t in given[3:9])


walk, walk_op = define("m2rnn", _forward, _fake, _backward, fake_backward=_fake_backward, save=_save)
