"""The custom ops everywhen::ssd and its backward: one name for torch.compile, autocast and activation checkpointing. They run the Triton
kernels only; `ssd` in __init__.py chooses between them and plain torch. Saved for backward are the inputs.

Legend: B batch, T time, H heads, P head width, G groups, N state width.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from kernels.dispatch import direct
from kernels.ssd import launch

# ruff: noqa: UP045  (the schema of a custom op is read from these annotations)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Optional[Tensor], h0: Optional[Tensor], starts: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """(y (B, T, H, P) in x's dtype, final state (B, H, P, N) fp32), T >= 1."""
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return launch.forward(x, dt, A, Bm, Cm, D, h0, starts)


scan_op = torch.library.custom_op("everywhen::ssd", _scan, mutates_args=())


@scan_op.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Optional[Tensor], h0: Optional[Tensor], starts: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    B, _, H, P = x.shape
    return x.new_empty(x.shape), x.new_empty(B, H, P, Bm.shape[-1], dtype=torch.float32)


def _backward(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Optional[Tensor], h0: Optional[Tensor], starts: Optional[Tensor],
    dy: Tensor, d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D and h0, each in the dtype of its tensor; of an absent D or h0 an empty tensor."""
    with torch.cuda.device_of(x):
        dx, d_dt, d_A, d_B, d_C, d_D, d_h0 = launch.backward(x, dt, A, Bm, Cm, D, h0, starts, dy, d_final)
    return (
        dx, d_dt.to(dt.dtype), d_A.to(A.dtype), d_B.to(Bm.dtype), d_C.to(Cm.dtype),
        d_A.new_empty(0) if D is None or d_D is None else d_D.to(D.dtype), d_A.new_empty(0) if h0 is None else d_h0.to(h0.dtype),
    )  # fmt: skip


backward_op = torch.library.custom_op("everywhen::ssd_backward", _backward, mutates_args=())
scan_backward = direct(backward_op, _backward)


@backward_op.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Optional[Tensor], h0: Optional[Tensor], starts: Optional[Tensor],
    dy: Tensor, d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(tensor: Optional[Tensor]) -> Tensor:
        return x.new_empty(0, dtype=torch.float32) if tensor is None else tensor.new_empty(tensor.shape)

    return like(x), like(dt), like(A), like(Bm), like(Cm), like(D), like(h0)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing unpacks a tensor a single time
    *gradients, d_D, d_h0 = scan_backward(*saved, dy, d_final)
    D, h0 = saved[5:7]
    return (*gradients, None if D is None else d_D, None if h0 is None else d_h0, None)


scan = direct(scan_op, _scan, _save, _differentiate)
