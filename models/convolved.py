"""What mixers share that convolve the columns of one projection and then walk matrix states: what lies before the first token, and when one kernel
takes a decoded token.

Legend: B batch, T time, D model width, E width of the projection, W width of the convolution, I its channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.contract import SequenceMixer
from models.layers import CausalConv
from models.segments import document_starts


class ConvolvedMixer(SequenceMixer):
    """A mixer with a short convolution `conv`, whose State says with `in_place` that a decoding step writes over its matrix states.

    one_kernel: all between the two projections of a decoded token is one kernel; without it as of any other tokens, by the function that evaluations
    watch and change (evals/cures/hooks.py).
    """

    conv: CausalConv
    one_kernel = True

    def decodes(self, x_BTD: Tensor) -> bool:
        """Whether that kernel takes x, of a mixer that has a state: it has no gradients, and weights that are offloaded come where a layer is called."""
        here = self.conv.weight.device == x_BTD.device
        return x_BTD.shape[1] == 1 and self.one_kernel and here and not torch.is_grad_enabled()

    def before(self, projected_BTE: Tensor, first: int, state: Any, segment_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(starts (B, T) of documents, the inputs (B, W - 1, I) of the convolution before the first token), from the state or the slice of time before.
        first: where its columns begin."""
        if self.slice is not None and state is None:
            convolved = projected_BTE[..., first : first + self.conv.channels]
            return self.slice.starts(segment_ids), self.slice.halo(convolved, self.conv.width, segment_ids)
        if state is None:
            return document_starts(segment_ids, None), None
        return document_starts(segment_ids, state.segment_B), state.conv_BWI

    def why_not_split(self, T: int = 1 << 62) -> str:
        return self.conv.why_not_split(T)

    def fixed_state(self, state: Any, capacity: int) -> Any:
        """A copy of `state` whose matrix states a decoding step writes over."""
        return replace(super().fixed_state(state, capacity), in_place=True)

    def open_state(self, state: Any) -> Any:
        """The same tensors as a state that nothing writes into."""
        return replace(state, in_place=False)
