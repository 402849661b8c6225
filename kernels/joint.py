"""The gradient of a projection of which several ops read columns, made in one tensor instead of put together from parts.

Legend: C columns of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import is_eager


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


def beside(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor (..., C) of which `parts` (..., C of each) are all columns, in their order; None where they are not."""
    first, C, at = parts[0], sum(t.shape[-1] for t in parts), 0
    if any(t.is_meta or type(t) is not Tensor for t in parts):
        return None
    for t in parts:
        same = t.dtype == first.dtype and t.shape[:-1] == first.shape[:-1] and t.stride() == first.stride()
        if not same or t.untyped_storage()._cdata != first.untyped_storage()._cdata or t.storage_offset() != first.storage_offset() + at:
            return None
        at += t.shape[-1]
    if first.stride(-1) != 1 or any(stride < C for size, stride in zip(first.shape[:-1], first.stride()[:-1]) if size > 1):
        return None
    return first.as_strided((*first.shape[:-1], C), first.stride())


def rooms(like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Memory for gradients of tensors (B, T, heads, width), the heads of a token beside each other: columns of one tensor, in their order, where the
    tensors are (see `columns`)."""
    parts = [t.flatten(2) if t.stride(3) == 1 and t.stride(2) == t.shape[3] else None for t in like]
    whole = None if any(t is None for t in parts) else beside(parts)  # type: ignore[arg-type]
    if whole is None:
        return [torch.empty(t.shape, dtype=dtype, device=t.device) for t in like]
    pieces = torch.empty(whole.shape, dtype=dtype, device=whole.device).split([t.shape[2] * t.shape[3] for t in like], 2)
    return [piece.unflatten(2, t.shape[2:]) for piece, t in zip(pieces, like)]


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        ctx.widths, ctx.shape = widths, x.shape
        ctx.set_materialize_grads(False)
        return x.split(widths, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        like = next((g for g in gradients if g is not None), None)
        if like is None:
            return None, None
        parts = [like.new_zeros(*ctx.shape[:-1], n) if g is None else g for g, n in zip(gradients, ctx.widths)]
        whole = beside(parts)
        return torch.cat(parts, -1) if whole is None else whole, None


def columns(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """x (..., C) split into columns. Gradients that come back as neighbouring columns of one tensor are taken as they lie, and not copied."""
    return _Columns.apply(x, widths) if is_eager(x) else x.split(widths, -1)
