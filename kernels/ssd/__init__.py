"""ssd: the state-space duality scan of Mamba-2."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from kernels.ssd import launch, op, plain, reference


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"Mamba-2's scan runs in plain torch, slowly. {reason}", stacklevel=3)


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
    D_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t + D x_t with h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T per head (arXiv 2405.21060).

    dt is positive (after softplus), A negative; heads share B and C in G groups. starts (B, T) bool zeroes the state before a step.
    Returns (y (B, T, H, P) in x's dtype, final state (B, H, P, N) in fp32 or fp64); differentiable in every tensor argument.
    On a GPU Triton kernels run, elsewhere and in float64 plain torch in chunks of `chunk` steps, 64 at most.
    Raises ValueError for a state or starts that do not fit.
    """
    (B, T, H, P), N = x_BTHP.shape, B_BTGN.shape[-1]
    if h0_BHPN is not None and h0_BHPN.shape != (B, H, P, N):
        raise ValueError(f"h0 must be {(B, H, P, N)}, not {tuple(h0_BHPN.shape)}.")
    if starts_BT is not None and (starts_BT.shape != (B, T) or starts_BT.dtype != torch.bool):
        raise ValueError(f"starts must be bool of shape {(B, T)}, not {starts_BT.dtype} of {tuple(starts_BT.shape)}.")
    if not T:
        return _nothing(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0_BHPN, D_H)
    if x_BTHP.shape[1] == 1 and h0_BHPN is not None and not torch.is_grad_enabled():  # decoding
        with torch.autocast(x_BTHP.device.type, enabled=False):
            return reference.ssd_step(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0_BHPN, starts_BT, D_H)
    reason = launch.why_not(x_BTHP)
    if not reason:
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN))
        y, final, _ = op.scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, h0_BHPN, starts_BT, keep)
        return y, final
    if x_BTHP.is_cuda and x_BTHP.dtype != torch.float64 and not torch.compiler.is_compiling():
        _warn_once(reason)
    return plain.scan(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, h0_BHPN, starts_BT, chunk, D_H)


def _nothing(x: Tensor, dt: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor | None, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results of no steps, of which autograd gives gradients of zero."""
    (B, _, H, P), N = x.shape, Bm.shape[-1]
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    nothing = sum(t.to(inner).sum() * 0 for t in (x, dt, A, Bm, Cm, D) if t is not None)
    first = torch.zeros(B, H, P, N, dtype=inner, device=x.device) if h0 is None else h0.to(inner)
    return (x + nothing).to(x.dtype), first + nothing
