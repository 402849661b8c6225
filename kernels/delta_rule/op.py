"""The op everywhen::delta_rule. It runs the Triton kernels only; `delta_rule` in __init__.py chooses between them and plain torch. Saved for
backward are the inputs and, if `keep`, what `launch.Kept` has of each chunk and sub-step, which is otherwise made again.

Legend: as in reference.py.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule import launch
from kernels.op import define


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(o (B, T, H, V) in v's dtype, final state (B, H, V, K) fp32, what is kept or empty tensors), T >= 1."""
    if keep:
        o, last, kept = launch.forward_kept(q, k, v, beta, g, h0, starts, normalize, scale)
        return o, last, *kept
    return *launch.forward(q, k, v, beta, g, h0, starts, normalize, scale), *_nothing_kept(v)


def _nothing_kept(v: Tensor) -> launch.Kept:
    kind = launch.kind_of(v.dtype)
    kinds = (kind, kind, torch.float64, torch.int32, torch.float32, torch.float32)
    inverse, corrected, total, document, rk, step = (v.new_empty(0, dtype=kind) for kind in kinds)
    return inverse, corrected, total, document, rk, step


def _fake(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float,
    keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, T, _, K), (S, H, V) = q.shape, v.shape[1:]
    results = v.new_empty(B, T, H, V), v.new_empty(B, H, V, K, dtype=torch.float32)
    if not keep:
        return *results, *_nothing_kept(v)
    length = -(-S // launch.CHUNK) * launch.CHUNK
    corrected = (length, launch.whole_width(max(V, launch.least_width()))) if launch.CORRECTED_KEPT else (0,)
    shapes = ((length, launch.CHUNK), corrected, *[(length,)] * 4)
    return *results, *(v.new_empty(B, H, *shape, dtype=t.dtype) if shape != (0,) else t for shape, t in zip(shapes, _nothing_kept(v)))


def _backward(
    do: Tensor | None, d_final: Tensor | None, d_inverse: Tensor | None, d_corrected: Tensor | None, d_total: Tensor | None,
    d_document: Tensor | None, d_rk: Tensor | None, d_step: Tensor | None,
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None,
    inverse: Tensor, corrected: Tensor, total: Tensor, document: Tensor, rk: Tensor, step: Tensor, normalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, beta, g and h0, each in the dtype of its tensor. Those of what is kept are not looked at: callers do not get it."""
    if do is None:
        do = torch.zeros(q.shape[0], q.shape[1], *v.shape[2:], dtype=v.dtype, device=v.device)
    kept = (inverse, corrected, total, document, rk, step) if inverse.numel() else None
    dq, dk, dv, d_beta, dg, dh0 = launch.backward(q, k, v, beta, g, h0, starts, normalize, scale, kept, do, d_final)
    return (
        dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_beta.to(beta.dtype),
        None if g is None or dg is None else dg.to(g.dtype), None if h0 is None else dh0.to(h0.dtype),
    )  # fmt: skip


def _save(inputs: Any, output: Any) -> tuple[Any, Any]:
    return (*inputs[:7], *output[2:]), inputs[7:9]


rule, rule_op = define("delta_rule", _forward, _fake, _backward, save=_save, materialize=False)
