"""step_sizes: the sizes of Mamba-2's steps, softplus of a projection and its bias between two limits, forward and backward in one kernel each."""

from __future__ import annotations

from torch import Tensor

from kernels.step_sizes import op, reference


def step_sizes(dt_BTH: Tensor, bias_H: Tensor, low: float, high: float) -> Tensor:
    """softplus(dt + bias) (B, T, H), no less than `low` and no more than `high`, in fp32 (fp64); dt may be columns of a wider tensor. Differentiable in
    dt and bias."""
    if op.use_triton(dt_BTH):
        sizes: Tensor = op.make(dt_BTH, bias_H, low, high)
        return sizes
    return reference.step_sizes(dt_BTH, bias_H, low, high)
