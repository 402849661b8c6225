"""The one contract of every sequence mixer: training, prefill, decoding and streaming are the same call.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.init import Module

if TYPE_CHECKING:
    from models.layers import RMSNorm
    from models.parallel import Slice


class SequenceMixer(Module):
    """Mixes along time, causally. `state=None` trains on whole sequences and returns no state; with `init_state(...)` the same call
    prefills, decodes (T = 1) and streams: the result does not depend on how a sequence is cut into calls.

    slice: set by models.parallel.split while x is one rank's part of the time of longer sequences; forward asks it for what lies before.
    """

    slice: Slice | None = None

    def forward(self, x_BTD: Tensor, state: Any = None, segment_ids: Tensor | None = None) -> tuple[Tensor, Any]:
        """y (B, T, D) and the new state (None if none was given). segment_ids (B, T) int: a token never sees another segment's."""
        raise NotImplementedError

    def init_state(self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """The empty state: a dataclass of tensors."""
        raise NotImplementedError

    def fused_step(self, x_BD: Tensor, norm: RMSNorm, keep_D: Tensor | None, state: Any) -> Callable[[], None] | None:
        """What takes x <- keep x + mixer(norm(x)) over one token in a few kernels, writing over x (fp32) and the state (of models/decode.py);
        None: there is no such form, and forward is called."""
        return None

    def state_bytes(self, T: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the state after T tokens."""
        raise NotImplementedError

    def flops_per_token(self, T: int) -> int:
        """Forward FLOPs of one token (2 per multiply-add), averaged over a sequence of T; norms and activations are not counted."""
        raise NotImplementedError

    def why_whole(self, T: int = 1 << 62) -> str:
        """Why time cannot be split over ranks in slices of T tokens, or ''."""
        return f"{type(self).__module__} has no form for it"

    def init_weights(self, std: float, n_layers: int) -> None:
        """Draws all parameters from torch's global generator."""
        raise NotImplementedError


def document_starts(segment_ids: Tensor | None, last_segment_B: Tensor | None = None) -> Tensor | None:
    """(B, T) bool: where a token's segment differs from the one before it; None without segments.

    last_segment: the segment the carried state ended in (-1: nothing seen yet, which starts nothing as the state is zero anyway).
    """
    if segment_ids is None:
        return None
    if last_segment_B is None:
        first = torch.zeros_like(segment_ids[:, :1], dtype=torch.bool)
    else:
        first = segment_ids[:, :1] != last_segment_B[:, None]
    return torch.cat([first, segment_ids[:, 1:] != segment_ids[:, :-1]], 1)


def last_segment(segment_ids: Tensor | None, before_B: Tensor) -> Tensor:
    """The segment a state ends in after a call; tokens without ids go on with the one before, or are segment 0 if nothing was before.
    No tokens leave it as it was."""
    if segment_ids is None:
        return before_B.clamp(min=0)
    return segment_ids[:, -1].to(before_B.dtype) if segment_ids.shape[1] else before_B


def tensor_bytes(state: Any) -> int:
    """Bytes of all tensors in a (nested) dataclass, list or tensor, the segment bookkeeping left out."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, (list, tuple)):
        return sum(tensor_bytes(item) for item in state)
    if dataclasses.is_dataclass(state):
        return sum(tensor_bytes(getattr(state, f.name)) for f in dataclasses.fields(state) if "segment" not in f.name)
    return 0
