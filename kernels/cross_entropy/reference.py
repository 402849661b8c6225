"""The cross entropy in plain torch: the oracle, and what runs where the kernels cannot. Legend: N rows, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import is_eager

IGNORED = -100  # the label of a row without a loss


def _wide(logits_NV: Tensor) -> Tensor:
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _where(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rows without a loss, rows whose label is none of the logits, a logit of each row: its label's if it has one)."""
    V = logits_NV.shape[1]
    ignored_N = labels_N == IGNORED
    outside_N = ((labels_N < 0) | (labels_N >= V)) & ~ignored_N
    if labels_N.device.type == "cpu" and is_eager(labels_N) and bool(outside_N.any()):
        raise ValueError(
            f"A label is {int(labels_N[outside_N][0])}, but there are logits 0 to {V - 1}; {IGNORED} marks a token without a loss."
        )
    return ignored_N, outside_N, torch.where(ignored_N | outside_N, 0, labels_N).long()


def losses(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood, log-partition) of each row, both 0 where the label is -100; differentiable. Raises ValueError on a CPU for a label
    that is neither that nor one of the logits; elsewhere, where raising would wait for the device, the row's loss is NaN."""
    ignored_N, outside_N, at_N = _where(logits_NV, labels_N)
    wide_NV = torch.where(ignored_N[:, None], 0.0, _wide(logits_NV))  # selected: NaN in a row that does not count has no gradient
    log_z_N = torch.logsumexp(wide_NV, -1)
    picked_N = wide_NV.gather(1, at_N[:, None])[:, 0]
    nll_N = torch.where(outside_N, torch.nan, log_z_N - picked_N)
    return torch.where(ignored_N, 0.0, nll_N), torch.where(ignored_N, 0.0, log_z_N)


def gradient(logits_NV: Tensor, labels_N: Tensor, log_z_N: Tensor, g_nll_N: Tensor, g_log_z_N: Tensor) -> Tensor:
    """softmax (g_nll + g_log_z) - onehot g_nll in the dtype of the logits; 0 where the label is -100, NaN where it is none of the logits."""
    ignored_N, outside_N, at_N = _where(logits_NV, labels_N)
    g_nll_N = torch.where(outside_N, torch.nan, g_nll_N)
    d_NV = (_wide(logits_NV) - log_z_N[:, None]).exp_().mul_((g_nll_N + g_log_z_N)[:, None])
    d_NV.scatter_add_(1, at_N[:, None], -g_nll_N[:, None])
    return d_NV.masked_fill_(ignored_N[:, None], 0.0).to(logits_NV.dtype)
