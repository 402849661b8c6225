"""delta_rule: a linear recurrence that corrects its memory: Gated DeltaNet, DeltaNet and DeltaProduct."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from kernels.delta_rule import launch, op, plain, reference


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"The delta rule runs in plain torch, slowly. {reason}", stacklevel=3)


def delta_rule(
    q_BTGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    beta_BSH: Tensor,
    g_BTH: Tensor | None = None,
    h0_BHVK: Tensor | None = None,
    starts_BT: Tensor | None = None,
    *,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = scale S_t q_t per head, S (V, K) (arXiv 2412.06464).

    k, v and beta may have n times as many steps S as q: then every token makes n such updates (arXiv 2502.10297), the gate before the first,
    the output after the last. a = exp(g), g in [-inf, 0] (none: a = 1); b = beta, up to 2 if keys have norm 1, which `normalize` gives to q and
    k. Value heads share queries and keys in G groups. starts (B, T) bool zeroes the state before a token.
    Returns (o (B, T, H, V) in v's dtype, final state (B, H, V, K) in fp32 or fp64); differentiable in every tensor argument.
    On a GPU Triton kernels run, elsewhere and in float64 plain torch in chunks. Raises ValueError for shapes that do not fit.
    """
    _check(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK, starts_BT)
    if not q_BTGK.shape[1]:
        return _nothing(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK)
    if q_BTGK.shape[1] == 1 and h0_BHVK is not None and not torch.is_grad_enabled():  # decoding
        with torch.autocast(q_BTGK.device.type, enabled=False):
            return reference.delta_rule_step(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK, starts_BT, normalize, scale)
    reason = launch.why_not(v_BSHV, q_BTGK.shape[-1])
    if not reason:
        tensors = (q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return op.rule(*tensors, starts_BT, normalize, scale, keep)[:2]
    if v_BSHV.is_cuda and v_BSHV.dtype != torch.float64 and not torch.compiler.is_compiling():
        _warn_once(reason)
    return plain.rule(q_BTGK, k_BSGK, v_BSHV, beta_BSH, g_BTH, h0_BHVK, starts_BT, normalize, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None, starts: Tensor | None) -> None:
    if q.ndim != 4 or v.ndim != 4 or not q.shape[2]:
        raise ValueError(
            f"q must be (B, T, G, K) and v (B, S, H, V), each of at least one group, not {tuple(q.shape)} and {tuple(v.shape)}."
        )
    (B, T, G, K), (S, H, V) = q.shape, v.shape[1:]
    if k.shape != (B, S, G, K) or beta.shape != (B, S, H) or v.shape[0] != B:
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)} and beta {tuple(beta.shape)} do not go together with q {tuple(q.shape)}.")
    if H % G or (S % T if T else S) or (T and not S):
        raise ValueError(f"{H} heads of values in {G} groups, and {S} updates of {T} tokens: the second must divide the first.")
    if g is not None and g.shape != (B, T, H):
        raise ValueError(f"g {tuple(g.shape)} must have the shape {(B, T, H)}.")
    if h0 is not None and h0.shape != (B, H, V, K):
        raise ValueError(f"h0 must be {(B, H, V, K)}, not {tuple(h0.shape)}.")
    if starts is not None and (starts.shape != (B, T) or starts.dtype != torch.bool):
        raise ValueError(f"starts must be bool of shape {(B, T)}, not {starts.dtype} of {tuple(starts.shape)}.")
    if any(t is not None and t.device != v.device for t in (q, k, beta, g, h0, starts)):
        raise ValueError(f"All tensors of the delta rule must be on one device, that of v is {v.device}.")
    if not all(t is None or t.is_floating_point() for t in (q, k, v, beta, g, h0)):
        raise ValueError("All tensors of the delta rule but starts must be of floating-point numbers.")


def _nothing(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results of no steps, of which autograd gives gradients of zero."""
    (B, _, _, K), (H, V) = q.shape, v.shape[2:]
    inner = torch.float64 if v.dtype == torch.float64 else torch.float32
    nothing = sum(t.to(inner).sum() * 0 for t in (q, k, v, beta, g) if t is not None)
    first = torch.zeros(B, H, V, K, dtype=inner, device=v.device) if h0 is None else h0.to(inner)
    return (v + nothing).to(v.dtype), first + nothing
