"""The op everywhen::delta_rule. It runs the Triton kernels only; `delta_rule` in __init__.py chooses between them and plain torch. Saved for
backward are the inputs.

Legend: as in reference.py.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule import launch
from kernels.op import define


def _forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(o (B, T, H, V) in v's dtype, final state (B, H, V, K) fp32), T >= 1."""
    return launch.forward(q, k, v, beta, g, h0, starts, normalize, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    (B, T, _, K), (H, V) = q.shape, v.shape[2:]
    return v.new_empty(B, T, H, V), v.new_empty(B, H, V, K, dtype=torch.float32)


def _backward(
    do: Tensor, d_final: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None,
    normalize: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v, beta, g and h0, each in the dtype of its tensor."""
    dq, dk, dv, d_beta, dg, dh0 = launch.backward(q, k, v, beta, g, h0, starts, normalize, scale, do, d_final)
    return (
        dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_beta.to(beta.dtype),
        None if g is None or dg is None else dg.to(g.dtype), None if h0 is None else dh0.to(h0.dtype),
    )  # fmt: skip


rule, rule_op = define("delta_rule", _forward, _fake, _backward)
