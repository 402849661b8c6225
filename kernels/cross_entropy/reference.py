"""The cross entropy in plain torch: the oracle, and what runs where the kernels cannot. Legend: N rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # the label of a row without a loss


def _wide(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def losses(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, 0 where the label is -100; log-partition) of each row; differentiable."""
    wide_NV = _wide(logits_NV)
    log_z_N = torch.logsumexp(wide_NV, -1)
    picked_N = wide_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    return (log_z_N - picked_N) * (labels_N != IGNORED), log_z_N


def gradient(logits_NV: Tensor, labels_N: Tensor, log_z_N: Tensor, g_nll_N: Tensor, g_log_z_N: Tensor) -> Tensor:
    """softmax (g_nll + g_log_z) - onehot g_nll in the dtype of the logits; g_nll counts as 0 where the label is -100."""
    g_nll_N = g_nll_N * (labels_N != IGNORED)
    d_NV = (_wide(logits_NV) - log_z_N[:, None]).exp_().mul_((g_nll_N + g_log_z_N)[:, None])
    d_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], -g_nll_N[:, None])
    return d_NV.to(logits_NV.dtype)
