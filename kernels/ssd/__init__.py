"""ssd: the state-space duality scan of Mamba-2."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.ssd import reference


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    h0_BHPN: Tensor | None = None,
    starts_BT: Tensor | None = None,
    *,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T per head (arXiv 2405.21060).

    dt is positive (after softplus), A negative; heads share B and C in G groups. starts (B, T) bool zeroes the state before a step.
    Returns (y (B, T, H, P) in x's dtype, final state (B, H, P, N) in fp32 or fp64); differentiable in every tensor argument.
    """
    with torch.autocast(x_BTHP.device.type, enabled=False):
        if x_BTHP.shape[1] == 1 and h0_BHPN is not None and not torch.is_grad_enabled():  # decoding
            return reference.ssd_step(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0_BHPN, starts_BT)
        arguments = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0_BHPN, starts_BT, chunk)
        if torch.is_grad_enabled():  # keep the inputs only: the (chunk, chunk) matrices of all heads are many times larger
            return checkpoint(reference.ssd_chunked, *arguments, use_reentrant=False, preserve_rng_state=False)
        return reference.ssd_chunked(*arguments)
