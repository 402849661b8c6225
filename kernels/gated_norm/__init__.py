"""gated_norm: RMSNorm with or without a SiLU gate, in one pass over its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_norm import op, reference


def gated_norm(
    h: Tensor,
    gate: Tensor | None,
    weight_D: Tensor,
    eps: float,
    groups: int = 1,
    norm_first: bool = False,
    dtype: torch.dtype | None = None,
    *,
    columns: tuple[int, int] = (0, 0),
) -> Tensor:
    """rms(h silu(gate)) weight, or with `norm_first` rms(h) weight silu(gate), or without a gate rms(h) weight, where rms(x) is x divided by
    the root of its mean square over each of the groups of the last dimension.

    h (..., D) and gate, shaped alike, may be strided. y (..., D) in `dtype` (h's if None), fp32 inside (fp64 for fp64 h). Differentiable in h, gate and weight.
    columns (first, of): the gate is columns from `first` on of a projection that `short_conv_columns` splits; its gradient is then made there.
    """
    if op.use_triton(h, groups):
        return op.norm(h, gate, weight_D, eps, groups, norm_first, dtype or h.dtype, *columns)
    return reference.gated_norm(h, gate, weight_D, eps, groups, norm_first, dtype)
