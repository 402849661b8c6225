"""The op everywhen::ssd. It runs the Triton kernels only; `ssd` in __init__.py chooses between them and plain torch. Saved for backward are the
inputs.

Legend: B batch, T time, H heads, P head width, G groups, N state width.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.op import define
from kernels.ssd import launch


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None, h0: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y (B, T, H, P) in x's dtype, final state (B, H, P, N) fp32), T >= 1."""
    return launch.forward(x, dt, A, Bm, Cm, D, h0, starts)


def _fake(x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, _, H, P = x.shape
    return x.new_empty(x.shape), x.new_empty(B, H, P, Bm.shape[-1], dtype=torch.float32)


def _backward(
    dy: Tensor | None, d_final: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None, h0: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D and h0, each in the dtype of its tensor. None is the gradient of a result that nobody asked of."""
    dx, d_dt, d_A, d_B, d_C, d_D, d_h0 = launch.backward(x, dt, A, Bm, Cm, D, h0, starts, dy, d_final)
    return (
        dx, d_dt.to(dt.dtype), d_A.to(A.dtype), d_B.to(Bm.dtype), d_C.to(Cm.dtype),
        None if D is None or d_D is None else d_D.to(D.dtype), None if h0 is None else d_h0.to(h0.dtype),
    )  # fmt: skip


scan, scan_op = define("ssd", _forward, _fake, _backward, materialize=False)
