"""What two slices of one delta rule have to tell each other. The state after a slice is E + S M, with S that before it: E what the slice ends in
from an empty state, and M (K, K) the product of its gates and updates. Both come of one walk over the states, without outputs: M is what the
slice ends in from the identity, its values zero.

Legend: as in reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule import launch, plain


def end_state(
    k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, starts: Tensor | None, normalize: bool, updates: int = 1
) -> tuple[Tensor, Tensor]:
    """(state (B, H, V, K) at the end of the slice from an empty one, product (B, H, K, K) that the state before it is multiplied by)."""
    (B, _, H, V), K = v.shape, k.shape[-1]
    inner = torch.float64 if v.dtype == torch.float64 else torch.float32
    h0 = torch.cat([torch.zeros(V, K, device=v.device, dtype=inner), torch.eye(K, device=v.device, dtype=inner)]).expand(B, H, V + K, K)
    values = F.pad(v, (0, K))
    if launch.why_not(v, K):
        last = plain.rule(k[:, ::updates], k, values, beta, g, h0, starts, normalize, 1.0)[1]
    else:
        last = launch.last_state(k, values, beta, g, h0, starts, normalize, updates)
    return last[:, :, :V].contiguous(), last[:, :, V:].contiguous()


def reached(through_BHKK: Tensor, state_BHVK: Tensor) -> Tensor:
    """What is left of a state behind a slice. Nothing comes through a product of zero, as where a document starts, not even what is not a number."""
    gone = (through_BHKK == 0).all(-1).all(-1)[..., None, None]
    return torch.where(gone, 0.0, torch.where(gone, 0.0, state_BHVK) @ through_BHKK)


def reached_back(through_BHKK: Tensor, adjoint_BHVK: Tensor) -> Tensor:
    """What an adjoint at the end of a slice is at its start."""
    return reached(through_BHKK.transpose(-1, -2), adjoint_BHVK)


def start_adjoint(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor | None,
    starts: Tensor | None,
    through: Tensor,
    *,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(gradient (B, H, V, K) of the state before the slice from its outputs' alone, the slice's product)."""
    (B, _, H, V), K = do.shape, q.shape[-1]
    if not launch.why_not(do, K):
        return launch.start_gradient(q, k, do, beta, g, starts, normalize, scale), through
    h0 = torch.zeros(B, H, V, K, dtype=through.dtype, device=do.device, requires_grad=True)
    with torch.enable_grad():
        o, _ = plain.rule(q, k, do.new_zeros(B, k.shape[1], H, V), beta, g, h0, starts, normalize, scale)
    return torch.autograd.grad(o, h0, do)[0], through
