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


class Documents:
    """The documents of a batch. Where they lie is looked up when it is first asked for, as that waits for the device, and kept for all
    layers, so `segments` must not change meanwhile."""

    def __init__(self, segments_BL: Tensor) -> None:
        self.segments_BL = segments_BL
        self._places: tuple[Tensor, list[list[int]]] | None = None

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
        """int32 (documents + 1,): where each document begins in the rows laid end to end, and their end."""
        return self._look_up()[0]

    def cuts(self) -> list[list[int]]:
        """For each row where its documents begin, and its length, on the host."""
        return self._look_up()[1]
