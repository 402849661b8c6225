"""The gradient of a projection of which several ops read columns, made in one tensor instead of put together from parts.

Legend: C columns of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class JointGradient:
    """What the backward passes of one projection's columns share: each mixer makes one a forward pass (`kernels.short_conv.joint_gradient`) and
    gives it to `gated_norm`, for which the gate is columns of the projection, and to `short_conv_columns`, which splits the projection.

    The norm's backward pass, the first to run, makes a tensor of the projection's size and writes the gate's gradient into its columns. The
    split's, to which all gradients of the projection come, writes the others beside it, and the whole is the projection's gradient."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._begun: Tensor | None = None

    def begin(self, part: Tensor, first: int) -> Tensor:
        """Room for the gradient of `part`, the columns from `first` on: a view of a new tensor (..., C)."""
        self._begun = torch.empty(*part.shape[:-1], self.columns, dtype=part.dtype, device=part.device)
        return self._begun[..., first : first + part.shape[-1]]

    def finish(self, like: Tensor, parts: Sequence[tuple[int, int, Tensor | None]]) -> Tensor:
        """The gradient of the projection `like` with these parts (first column, end, gradient; None is zero) in place, and nothing yet in the
        other columns. The begun tensor is used where a part lies in it, so that what was begun for another pass is left alone."""
        begun, self._begun = self._begun, None
        if (
            begun is None
            or begun.shape != like.shape
            or begun.dtype != like.dtype
            or not any(_lies(g, begun[..., a:b]) for a, b, g in parts)
        ):
            begun = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for a, b, gradient in parts:
            room = begun[..., a:b]
            if gradient is None:
                room.zero_()
            elif not _lies(gradient, room):
                room.copy_(gradient)
        return begun


def _lies(gradient: Tensor | None, room: Tensor) -> bool:
    """Whether a gradient is this piece of memory."""
    if gradient is None or gradient.is_meta or type(gradient) is not Tensor:
        return False
    return gradient.data_ptr() == room.data_ptr() and gradient.stride() == room.stride() and gradient.shape == room.shape
