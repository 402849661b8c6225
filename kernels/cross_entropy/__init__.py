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
LEAST_ROW, MOST_ROW = (
    16384,
    57344,
)  # logits of rows in bf16 that are held whole: enough for 32 warps, and what registers and shared memory hold
STAGES = 3  # two rows are on their way or have come while one is in work


def use_triton(logits_NV: Tensor) -> bool:
    return (
        (is_eager(logits_NV) or planned())
        and logits_NV.dtype != torch.float64
        and logits_NV.numel() > 0
        and not no_triton(logits_NV.device)
    )


def block(V: int, most: int = BLOCK) -> int:
    return 64 if interpreted() else min(most, 1 << max(7, (V - 1).bit_length()))


def pieces(V: int) -> tuple[int, int]:
    """Words of each of the first six pieces of a row and of the last one."""
    words = V // 2
    each = 1 << ((words // 6).bit_length() - 1)
    return each, 1 << max(5, (words - 6 * each - 1).bit_length())


def by_rows(logits_NV: Tensor) -> bool:
    """Whether losses and gradient at once hold whole rows: bf16, in words of 16 bytes, as many as fit."""
    V = logits_NV.shape[1]
    if logits_NV.dtype != torch.bfloat16 or V % 8 or logits_NV.data_ptr() % 16 or not LEAST_ROW <= V <= MOST_ROW:
        return False
    if interpreted():
        return True
    room = torch.cuda.get_device_properties(logits_NV.device).shared_memory_per_multiprocessor - 1024  # what a program may have
    return not torch.version.hip and room >= 4 * (STAGES - 1) * (6 * pieces(V)[0] + pieces(V)[1]) + 1024  # words, and sums over warps


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
        if by_rows(logits_NV):
            (A, REST), words = pieces(V), logits_NV.view(torch.int32)
            programs = min(N, 2 if interpreted() else torch.cuda.get_device_properties(words.device).multi_processor_count)
            kernels.losses_and_gradient_by_rows[(programs,)](
                words, labels_N.contiguous(), nll_N, log_z_N, N, V, V // 2, A=A, REST=REST, STAGES=STAGES, num_warps=WARPS_AT_ONCE
            )
        else:
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
