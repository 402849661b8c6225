"""cross_entropy: losses of rows of logits, and the gradient of the logits written over them, each or both in one pass over memory.

In torch operations a pass over (rows, vocabulary) is paid a dozen times, which is more than the head's matrix products take. They are no
differentiable ops: `models.head` calls them inside its own forward and backward. Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cross_entropy import reference
from kernels.dispatch import interpreted, is_eager, no_triton, planned

BLOCK, WARPS = 8192, 8  # columns at a time of a program, and its warps
BLOCK_AT_ONCE, WARPS_AT_ONCE = 16384, 32  # of losses and gradient at once: two programs a multiprocessor, whose rows the cache holds


def use_triton(logits_NV: Tensor) -> bool:
    return (
        (is_eager(logits_NV) or planned())
        and logits_NV.dtype != torch.float64
        and logits_NV.numel() > 0
        and not no_triton(logits_NV.device)
    )


def block(V: int, most: int = BLOCK) -> int:
    return 64 if interpreted() else min(most, 1 << max(7, (V - 1).bit_length()))


def losses(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, log-partition) of each row, both 0 where the label is -100, fp32 inside and out (fp64 for fp64).

    labels (N,) of any integer dtype. One that is neither -100 nor in [0, V): ValueError on a CPU; on a GPU, where raising would wait for the
    device, the row's loss is NaN."""
    if not use_triton(logits_NV):
        return reference.losses(logits_NV, labels_N)
    from kernels.cross_entropy import triton as kernels

    logits_NV, (N, V) = logits_NV.contiguous(), logits_NV.shape
    nll_N, log_z_N = (torch.empty(N, device=logits_NV.device) for _ in range(2))
    if planned():  # tensors without storage: shapes only
        return nll_N, log_z_N
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device
        kernels.losses[(N,)](logits_NV, labels_N.contiguous(), nll_N, log_z_N, V, BV=block(V), num_warps=WARPS)
    return nll_N, log_z_N


def losses_and_gradient_(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(negative log-likelihood, log-partition, gradient of the summed losses in the dtype of the logits, which may be written over): `losses` and
    `gradient_` of ones, in one pass over memory."""
    if not use_triton(logits_NV):
        nll_N, log_z_N = reference.losses(logits_NV, labels_N)
        return nll_N, log_z_N, reference.gradient(logits_NV, labels_N, log_z_N, torch.ones_like(nll_N), torch.zeros_like(nll_N))
    from kernels.cross_entropy import triton as kernels

    logits_NV, (N, V) = logits_NV.contiguous(), logits_NV.shape
    nll_N, log_z_N = (torch.empty(N, device=logits_NV.device) for _ in range(2))
    if planned():
        return nll_N, log_z_N, logits_NV
    with torch.cuda.device_of(logits_NV):
        BV = block(V, BLOCK_AT_ONCE)
        kernels.losses_and_gradient[(N,)](
            logits_NV, labels_N.contiguous(), nll_N, log_z_N, V, BV=BV, num_warps=WARPS_AT_ONCE if BV == BLOCK_AT_ONCE else WARPS
        )
    return nll_N, log_z_N, logits_NV


def gradient_(logits_NV: Tensor, labels_N: Tensor, log_z_N: Tensor, g_nll_N: Tensor, g_log_z_N: Tensor) -> Tensor:
    """softmax (g_nll + g_log_z) - onehot g_nll, in the dtype of the logits, which may be written over; 0 where the label is -100, NaN where it
    is none of the logits."""
    if not use_triton(logits_NV):
        return reference.gradient(logits_NV, labels_N, log_z_N, g_nll_N, g_log_z_N)
    from kernels.cross_entropy import triton as kernels

    logits_NV, (N, V) = logits_NV.contiguous(), logits_NV.shape
    row_values = (labels_N.contiguous(), log_z_N.contiguous(), g_nll_N.float().contiguous(), g_log_z_N.float().contiguous())
    if planned():
        return logits_NV
    BV = block(V)
    with torch.cuda.device_of(logits_NV):
        kernels.logits_gradient[(N, -(-V // BV))](logits_NV, *row_values, V, BV=BV, num_warps=WARPS)
    return logits_NV
