"""Segments: which document each token of a row belongs to, and where documents begin.

`segment_ids` (B, T) numbers the documents that are packed into a row. No mixer lets a token see another segment's.
Legend: B batch, T time, L tokens of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(segment_ids: Tensor | None, last_segment_B: Tensor | None = None) -> Tensor | None:
    """(B, T) bool: where a token's segment differs from the one before it; None without segments.

    last_segment_B: the segment the carried state ended in (-1: nothing seen yet, which starts nothing as the state is zero anyway).
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


def documents_in(segments_BT: Tensor) -> int:
    """How many documents there are in all rows; waits for a device that holds them."""
    return segments_BT.shape[0] + int((segments_BT[:, 1:] != segments_BT[:, :-1]).sum())


def most_documents(tokens: int) -> int:
    """How many documents a CUDA graph of so many tokens has room for."""
    return max(64, tokens // 64)


class Documents:
    """The documents of a batch. Where they lie is looked up when it is first asked for, as that waits for the device, and kept for all
    layers, so `segments` must not change meanwhile."""

    def __init__(self, segments_BL: Tensor) -> None:
        self.segments_BL = segments_BL
        self._places: tuple[Tensor, list[list[int]]] | None = None
        self._fixed: Tensor | None = None
        self._bounds: tuple[Tensor, Tensor] | None = None

    def _look_up(self) -> tuple[Tensor, list[list[int]]]:
        if self._places is None:
            L = self.segments_BL.shape[1]
            first = document_starts(self.segments_BL)
            assert first is not None
            first[:, :1] = True
            borders = F.pad(first.flatten().nonzero()[:, 0].int(), (0, 1), value=first.numel())
            cuts: list[list[int]] = [[] for _ in range(len(self.segments_BL))]
            for at in borders.tolist()[:-1]:
                cuts[at // L].append(at % L)
            self._places = borders, [[*row, L] for row in cuts]
        return self._places

    def borders(self) -> Tensor:
        """int32 (documents + 1,): where each document begins in the rows laid end to end, and their end. While a CUDA graph is captured:
        (`most_documents` + 1,), filled up with ends, found without waiting for the device; there must not be more documents than that."""
        if not (self.segments_BL.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._look_up()[0]
        if self._fixed is None:
            self._fixed = self._fixed_borders()
        return self._fixed

    def _fixed_borders(self) -> Tensor:
        first = document_starts(self.segments_BL)
        assert first is not None
        first[:, :1] = True
        N = first.numel()
        places = F.pad(torch.where(first.flatten(), torch.arange(N, device=first.device), N), (0, most_documents(N)), value=N)
        return places.sort().values[: most_documents(N) + 1].int()

    def bounds(self) -> tuple[Tensor, Tensor]:
        """int32 (B, L) each, found without waiting for the device: the places in its row of the first and the last token of each token's
        document."""
        if self._bounds is None:
            first = document_starts(self.segments_BL)
            assert first is not None
            L = first.shape[1]
            place = torch.arange(L, device=first.device)
            begins = torch.where(first, place, 0).cummax(1).values
            ends = torch.where(F.pad(first[:, 1:], (0, 1), value=True), place, L).flip(1).cummin(1).values.flip(1)
            self._bounds = begins.int(), ends.int()
        return self._bounds

    def cuts(self) -> list[list[int]]:
        """For each row where its documents begin, and its length, on the host."""
        return self._look_up()[1]
