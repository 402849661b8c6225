"""embedding: rows of a table, whose gradient is the sum of the rows' gradients, written once and added in one order.

torch's own takes six times as long as its bytes: it sums a row's gradients by halves of a warp and clears the table before. Legend: N tokens,
V rows of the table, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import is_eager, planned
from kernels.embedding import reference
from kernels.op import runs_kernels


def table_gradient(d_ND: Tensor, ids_N: Tensor, rows: int) -> Tensor:
    """(rows, D) in fp32 (fp64): the sum of d over the tokens of each id. ids: integers in [0, rows)."""
    if not runs_kernels(d_ND) or not d_ND.numel() or planned():
        return reference.table_gradient(d_ND, ids_N, rows)
    from kernels.embedding import triton

    with torch.cuda.device_of(d_ND):  # Triton launches on the current device
        return triton.table_gradient(d_ND, ids_N, rows)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = weight_VD.shape[0]
        return F.embedding(ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return table_gradient(d.flatten(0, -2), ids.flatten(), ctx.rows), None


def embedding(weight_VD: Tensor, ids: Tensor) -> Tensor:
    """(..., D): the rows of `ids`, differentiable once."""
    ours = (weight_VD.is_cuda and is_eager(weight_VD) or planned()) and weight_VD.dtype == torch.float32
    if not ours or not (torch.is_grad_enabled() and weight_VD.requires_grad):
        return F.embedding(ids, weight_VD)
    made: Tensor = _Rows.apply(weight_VD, ids)
    return made
