"""The op everywhen::ssd. It runs the Triton kernels only; `ssd` in __init__.py chooses between them and plain torch. Saved for backward are the
inputs, and where `keep` is set and chunks are those of the backward pass the states entering them: B T/Q H P N numbers for a walk less.

Legend: B batch, T time, H heads, P head width, G groups, N state width.
"""

import torch
from torch import Tensor

from kernels.dispatch import interpreted
from kernels.op import define
from kernels.ssd import launch


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None, h0: Tensor | None, starts: Tensor | None, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (B, T, H, P) in x's dtype, final state (B, H, P, N) fp32, what is kept for the backward pass or nothing), T >= 1."""
    kept: list[Tensor] = []
    y, final = launch.forward(x, dt, A, Bm, Cm, D, h0, starts, kept if keep and launch.keeps(x, Bm) is not None else None)
    return y, final, kept[0] if kept else x.new_empty(0)


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None, h0: Tensor | None, starts: Tensor | None, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, H, P = x.shape
    shape = launch.keeps(x, Bm) if keep else None
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and not interpreted() else torch.float32
    kept = x.new_empty(0) if shape is None else x.new_empty(shape, dtype=dtype)
    return x.new_empty(x.shape), x.new_empty(B, H, P, Bm.shape[-1], dtype=torch.float32), kept


def _backward(
    dy: Tensor | None, d_final: Tensor | None, d_kept: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None,
    h0: Tensor | None, starts: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D and h0, each in the dtype of its tensor. None is the gradient of a result that nobody asked of."""
    dx, d_dt, d_A, d_B, d_C, d_D, d_h0 = launch.backward(x, dt, A, Bm, Cm, D, h0, starts, dy, d_final, kept if kept.numel() else None)
    return (
        dx, d_dt.to(dt.dtype), d_A.to(A.dtype), d_B.to(Bm.dtype), d_C.to(Cm.dtype),
        None if D is None or d_D is None else d_D.to(D.dtype), None if h0 is None else d_h0.to(h0.dtype),
    )  # fmt: skip


scan, scan_op = define("ssd", _forward, _fake, _backward, materialize=False, save=lambda inputs, output: ((*inputs[:8], output[2]), ()))
