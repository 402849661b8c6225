"""Where attention keeps keys and values: buffers that a growing cache is written into, and a cache of fixed size for CUDA graphs.

Legend: B batch, T new tokens, L cached tokens, C capacity, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Room:
    """Buffers (B, G, C, K) that k and v are the first `used` tokens of. Whoever holds exactly those may write the next ones in place; a state
    that others have gone on from finds `used` changed and copies, so that no state is ever written into."""

    def __init__(self, k_BGLK: Tensor, v_BGLK: Tensor, capacity: int) -> None:
        B, G, L, K = k_BGLK.shape
        self.k, self.v = k_BGLK.new_empty(B, G, capacity, K), v_BGLK.new_empty(B, G, capacity, K)
        self.k[:, :, :L], self.v[:, :, :L], self.used = k_BGLK, v_BGLK, L

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        end = self.used + k_BGTK.shape[2]
        self.k[:, :, self.used : end], self.v[:, :, self.used : end], self.used = k_BGTK, v_BGTK, end
        return self.k[:, :, :end], self.v[:, :, :end]


@dataclass
class FixedCache:
    """A cache of fixed size for graphs of one decoding step: buffers, each place's segment, and the tokens seen as a tensor. A step writes
    into it, behind what was seen."""

    k_BGCK: Tensor
    v_BGCK: Tensor
    segments_BC: Tensor
    seen: Tensor  # (1,): tokens in the buffers
    offset: int = 0  # tokens that a window dropped before

    @staticmethod
    def of(k_BGLK: Tensor, v_BGLK: Tensor, segments_BL: Tensor | None, seen: int, capacity: int) -> FixedCache:
        """A copy with room for `capacity` tokens in all. What follows is of the last token's segment."""
        room, cached = Room(k_BGLK, v_BGLK, capacity), k_BGLK.shape[2]
        room.k[:, :, cached:], room.v[:, :, cached:] = 0, 0
        segments = torch.zeros(room.k.shape[0], capacity, dtype=torch.int32, device=room.k.device)
        if segments_BL is not None:
            segments[:, :cached] = segments_BL
            segments[:, cached:] = segments_BL[:, -1:]
            gone = (segments != segments[:, -1:])[
                :, None, :, None
            ]  # the mask hides these, but a masked NaN would still spread: they become zero
            room.k.masked_fill_(gone, 0.0)
            room.v.masked_fill_(gone, 0.0)
        return FixedCache(room.k, room.v, segments, torch.tensor([cached], device=room.k.device), seen - cached)

    def length(self) -> Tensor:
        """(B,): tokens of each row's last document, with the one that is written next."""
        last_B1 = self.segments_BC[:, -1:]
        place = torch.arange(self.segments_BC.shape[1], device=last_B1.device)
        here_BC = (self.segments_BC == last_B1) & (place <= self.seen)
        return here_BC.sum(1) + self.offset * here_BC[:, 0]

    def write(self, k_BGTK: Tensor, v_BGTK: Tensor, window: int) -> Tensor:
        """Writes the next token's (T = 1) and returns the mask (B, 1, 1, C) of what it sees; `seen` is left to the caller."""
        self.k_BGCK.index_copy_(2, self.seen, k_BGTK.to(self.k_BGCK.dtype))
        self.v_BGCK.index_copy_(2, self.seen, v_BGTK.to(self.v_BGCK.dtype))
        place = torch.arange(self.k_BGCK.shape[2], device=k_BGTK.device)
        visible = place <= self.seen
        if window:
            visible = visible & (place > self.seen - window)
        return (visible & (self.segments_BC == self.segments_BC[:, -1:]))[:, None, None]
