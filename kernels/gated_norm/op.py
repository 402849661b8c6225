"""The custom ops everywhen::gated_norm and its backward. Saved for backward are the inputs.

Legend: D width.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from kernels.dispatch import direct, no_triton, plain
from kernels.gated_norm import reference

# ruff: noqa: UP045  (the schema of a custom op is read from these annotations)
WIDEST = 16384  # channels of a group that the registers of a program hold


def use_triton(h: Tensor, groups: int) -> bool:
    return h.dtype != torch.float64 and h.shape[-1] // groups <= WIDEST and not no_triton(h.device)


def _norm(
    h: Tensor,
    gate: Optional[Tensor],
    weight: Tensor,
    eps: float,
    groups: int,
    norm_first: bool,
    dtype: torch.dtype,
    first_column: int,
    columns: int,
) -> Tensor:
    """y (..., D) in `dtype`. columns > 0: the gradient of gate is made inside a tensor of so many columns, from `first_column` on."""
    if use_triton(h, groups) and h.numel():
        from kernels.gated_norm import launch

        with torch.cuda.device_of(h):  # Triton launches on the current device
            return launch.norm(h, gate, weight, eps, groups, norm_first, dtype)
    return reference.gated_norm(h, gate, weight, eps, groups, norm_first, dtype).contiguous()


norm_op = torch.library.custom_op("everywhen::gated_norm", _norm, mutates_args=())


@norm_op.register_fake
def _(
    h: Tensor,
    gate: Optional[Tensor],
    weight: Tensor,
    eps: float,
    groups: int,
    norm_first: bool,
    dtype: torch.dtype,
    first_column: int,
    columns: int,
) -> Tensor:
    return h.new_empty(h.shape, dtype=dtype)


def _backward(
    dy: Tensor, h: Tensor, gate: Optional[Tensor], weight: Tensor, eps: float, groups: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, gate (empty without one) and weight, each in the dtype of its tensor."""
    if use_triton(h, groups) and dy.numel():
        return _launch(dy, h, gate, weight, eps, groups, norm_first, None)
    found = reference.gated_norm_backward(dy, h, gate, weight, eps, groups, norm_first)
    dh, d_gate, d_weight = (f.to((h if t is None else t).dtype).contiguous() for f, t in zip(found, (h, gate, weight)))
    return dh, d_gate, d_weight


def _launch(
    dy: Tensor,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    groups: int,
    norm_first: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.gated_norm import launch

    with torch.cuda.device_of(h):
        dh, d_gate, d_weight = launch.norm_backward(dy, h, gate, weight, eps, groups, norm_first, out)
    return dh, h.new_empty(0) if d_gate is None else d_gate, d_weight


backward_op = torch.library.custom_op("everywhen::gated_norm_backward", _backward, mutates_args=())
norm_backward = direct(backward_op, _backward)


@backward_op.register_fake
def _(
    dy: Tensor, h: Tensor, gate: Optional[Tensor], weight: Tensor, eps: float, groups: int, norm_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), h.new_empty(0) if gate is None else gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    h, gate, weight, ctx.eps, ctx.groups, ctx.norm_first, _, ctx.first_column, ctx.columns = inputs
    ctx.save_for_backward(h, gate, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    h, gate, weight = ctx.saved_tensors
    settings = (ctx.eps, ctx.groups, ctx.norm_first)
    if ctx.columns and gate is not None and plain(dy) and use_triton(h, ctx.groups) and dy.numel():
        whole = torch.empty(*gate.shape[:-1], ctx.columns, dtype=gate.dtype, device=gate.device)
        d_gate = whole[..., ctx.first_column : ctx.first_column + gate.shape[-1]]
        dh, _, d_weight = _launch(dy, h, gate, weight, *settings, d_gate)
        d_gate.whole = whole  # type: ignore[attr-defined]  # short_conv.op.Columns writes the other columns
    else:
        dh, d_gate, d_weight = norm_backward(dy, h, gate, weight, *settings)
    return (dh, None if gate is None else d_gate, d_weight, *[None] * 6)


norm = direct(norm_op, _norm, _save, _differentiate)
