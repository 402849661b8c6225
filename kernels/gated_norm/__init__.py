"""gated_norm: RMSNorm with or without a SiLU gate, in one pass over its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import is_eager
from kernels.gated_norm import columns as of_columns
from kernels.gated_norm import op, reference
from kernels.joint import JointGradient


def gated_norm(
    h: Tensor,
    gate: Tensor | None,
    weight_D: Tensor,
    eps: float,
    groups: int = 1,
    norm_first: bool = False,
    dtype: torch.dtype | None = None,
    *,
    columns: tuple[int, JointGradient | None] = (0, None),
) -> Tensor:
    """rms(h silu(gate)) weight, or with `norm_first` rms(h) weight silu(gate), or without a gate rms(h) weight, where rms(x) is x divided by
    the root of its mean square over each of the groups of the last dimension.

    h (..., D) and gate, shaped alike, may be strided. y (..., D) in `dtype` (h's if None), fp32 inside (fp64 for fp64 h). Differentiable in h, gate and weight.
    columns (first, joint): the gate is columns from `first` on of a projection that `short_conv_columns` splits; its gradient is then made
    where that of the projection is, with the same `kernels.short_conv.joint_gradient`.
    """
    if not op.use_triton(h, groups):
        return reference.gated_norm(h, gate, weight_D, eps, groups, norm_first, dtype)
    first, joint = columns
    if joint is not None and gate is not None and h.numel() and is_eager(h):
        return of_columns.GateOfColumns.apply(h, gate, weight_D, eps, groups, norm_first, dtype or h.dtype, first, joint)
    return op.norm(h, gate, weight_D, eps, groups, norm_first, dtype or h.dtype)
