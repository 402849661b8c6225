"""What mixers share that convolve the columns of one projection and then walk matrix states: when one kernel takes a decoded token, and its state.

Legend: B batch, T time, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.contract import SequenceMixer
from models.layers import CausalConv


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

    def fixed_state(self, state: Any, capacity: int) -> Any:
        """A copy of `state` whose matrix states a decoding step writes over."""
        return replace(super().fixed_state(state, capacity), in_place=True)

    def open_state(self, state: Any) -> Any:
        """The same tensors as a state that nothing writes into."""
        return replace(state, in_place=False)
