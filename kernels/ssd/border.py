"""What two slices of one Mamba-2 scan have to tell each other, as matrix products over all steps at once, without a scan.

Sums over time are accumulated in fp32 (fp64 for fp64) piece by piece, so that no weighted copy of the whole input is ever held.

Legend: B batch, T time, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 8192  # steps whose weighted inputs exist at once


def end_state(x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(state (B, H, P, N) at the end of the slice from an empty one, what is left there of the state before it (B, H))."""
    decay_BTH = dt_BTH * A_H
    # Sums from the end, so that they are exact where anything is left.
    after_BTH = F.pad(_running(decay_BTH[:, 1:].flip(1)).flip(1), (0, 0, 0, 1))
    weight_BTH, through_BH, same = dt_BTH * torch.exp(after_BTH), _left(decay_BTH.sum(1)), None
    if starts is not None:
        documents = starts.int().cumsum(1)
        same = documents == documents[:, -1:]
        weight_BTH = torch.where(same[..., None], weight_BTH, 0.0)
        through_BH = torch.where(documents[:, -1:] == 0, through_BH, 0.0)
    return _outer(x_BTHP, weight_BTH, B_BTGN, same), through_BH


def start_adjoint(dy_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, C_BTGN: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gradient (B, H, P, N) of the state before the slice from its outputs' alone, what is left there of the final state's (B, H))."""
    left_BTH, same = _left(_running(dt_BTH * A_H)), None
    if starts is not None:
        same = starts.cumsum(1) == 0
        left_BTH = torch.where(same[..., None], left_BTH, 0.0)
    return _outer(dy_BTHP, left_BTH, C_BTGN, same), left_BTH[:, -1].contiguous()


def _left(decay: Tensor) -> Tensor:
    """What is left after a decay (a logarithm): never zero, which is said of documents' starts."""
    return torch.exp(decay).clamp(min=torch.finfo(decay.dtype).tiny)


def _running(x_BTH: Tensor) -> Tensor:
    """cumsum over time; along another dimension than the last torch gives each column a single thread."""
    return x_BTH.transpose(1, 2).contiguous().cumsum(2).transpose(1, 2)


def _outer(x_BTHP: Tensor, weight_BTH: Tensor, B_BTGN: Tensor, same_BT: Tensor | None) -> Tensor:
    """sum_t weight_t x_t B_t^T per head, (B, H, P, N), in the dtype of the weights, over the steps of `same` (all if None): the others are left
    out of the product, where zero times NaN would be NaN."""
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    total = weight_BTH.new_zeros(B * G, H // G * P, N)
    low = x_BTHP.is_cuda and x_BTHP.dtype in (torch.bfloat16, torch.float16)
    for first in range(0, T, PIECE):
        part = slice(first, first + PIECE)
        x = x_BTHP[:, part] * weight_BTH[:, part, :, None].to(x_BTHP.dtype if low else weight_BTH.dtype)
        if same_BT is not None:
            x = torch.where(same_BT[:, part, None, None], x, 0.0)
        x = x.unflatten(2, (G, H // G)).permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        b = B_BTGN[:, part].to(x.dtype)
        if same_BT is not None:
            b = torch.where(same_BT[:, part, None, None], b, 0.0)
        b = b.transpose(1, 2).flatten(0, 1)
        total += torch.bmm(x, b, out_dtype=total.dtype) if low else torch.bmm(x, b)
    return total.view(B, H, P, N)
