"""m2rnn: a recurrence of matrix states that is not linear, each head's new content the tanh of a product with a weight of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.m2rnn import op, reference

__all__ = ["m2rnn"]


def m2rnn(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    w_HVV: Tensor,
    h0_BHKV: Tensor | None = None,
    starts_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = f_t S_{t-1} + (1 - f_t) tanh(S_{t-1} W + k_t v_t^T), o_t = S_t^T q_t per head, S (K, V) (arXiv 2603.14360).

    f = exp(g), g in [-inf, 0]. Heads share queries and keys in G groups. w (H, V, V): as (head, input, output). starts (B, T) bool: True where a
    document starts and the state is zeroed first. h0: the state before the first step (zeros if None).
    Returns (o (B, T, H, V) in v's dtype, final state (B, H, K, V) in fp32 or fp64); differentiable in every tensor argument.
    Where Triton kernels are not to be had, and in float64, plain torch walks.
    Raises ValueError for shapes that do not fit, and for integers.
    """
    fits = q_BTGK.ndim == v_BTHV.ndim == 4 and k_BTGK.shape == q_BTGK.shape and v_BTHV.shape[:2] == q_BTGK.shape[:2]
    (B, T, G, K), (H, V) = q_BTGK.shape if fits else (0,) * 4, v_BTHV.shape[2:] if fits else (0, 0)
    if G < 1 or H % G or g_BTH.shape != (B, T, H) or w_HVV.shape != (H, V, V):
        raise ValueError(
            f"q {tuple(q_BTGK.shape)}, k {tuple(k_BTGK.shape)}, v {tuple(v_BTHV.shape)}, g {tuple(g_BTH.shape)} and w {tuple(w_HVV.shape)} "
            "must be (B, T, G, K) twice, (B, T, H, V), (B, T, H) and (H, V, V), where G divides H."
        )
    if h0_BHKV is not None and h0_BHKV.shape != (B, H, K, V):
        raise ValueError(f"h0 must be {(B, H, K, V)}, not {tuple(h0_BHKV.shape)}.")
    if starts_BT is not None and (starts_BT.shape != (B, T) or starts_BT.dtype != torch.bool):
        raise ValueError(f"starts must be bool of shape {(B, T)}, not {starts_BT.dtype} of {tuple(starts_BT.shape)}.")
    tensors = (q_BTGK, k_BTGK, v_BTHV, g_BTH, w_HVV, h0_BHKV)
    if not all(t is None or t.is_floating_point() for t in tensors):
        raise ValueError(
            f"M2RNN takes real floating-point numbers, not {', '.join(sorted({str(t.dtype) for t in tensors if t is not None}))}."
        )
    if B * T * H * K * V == 0:
        return _nothing(*tensors)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if T == 1 and h0_BHKV is not None and not wanted:  # decoding
        return reference.m2rnn(*tensors, starts_BT)
    return op.walk(*tensors, starts_BT, wanted)[:2]


def _nothing(q: Tensor, k: Tensor, v: Tensor, g: Tensor, w: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Results of no steps or of states without numbers, of which autograd gives gradients of zero."""
    inner = reference.compute_dtype(v)
    nothing = torch.stack([t.flatten()[:0].to(inner).sum() for t in (q, k, v, g, w)]).sum()  # not of values, which may be infinite
    first = v.new_zeros(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=inner) if h0 is None else h0.to(inner)
    return torch.zeros_like(v) + nothing.to(v.dtype), first + nothing
