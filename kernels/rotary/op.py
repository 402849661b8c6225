"""The custom op everywhen::rotary, which is its own backward, turned the other way. Saved for backward are the positions.

Legend: B batch, T time, H query heads, G key heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import direct, no_triton
from kernels.rotary import reference


def use_triton(q: Tensor, k: Tensor) -> bool:
    return q.dtype != torch.float64 and q.dtype == k.dtype and not no_triton(q.device)


def _turn(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, back: bool, frequencies: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, K) and k (B, G, T, K) turned by `positions` (T,), or back by them; views of contiguous (B, T, heads, K)."""
    if use_triton(q, k) and q.numel() and k.numel():
        from kernels.rotary import triton as kernels

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return kernels.launch(q, k, positions, theta, back, frequencies, scale)
    where = -positions if back else positions
    turned = [reference.rotate(x, where, theta, frequencies, scale).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    return turned[0], turned[1]


turn_op = torch.library.custom_op("everywhen::rotary", _turn, mutates_args=())


@turn_op.register_fake
def _(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, back: bool, frequencies: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    made = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k)]
    return made[0], made[1]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, positions, ctx.theta, ctx.back, *more = inputs
    frequencies, ctx.scale = more or (None, 1.0)
    ctx.more = len(more)
    ctx.save_for_backward(positions, frequencies)


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    positions, frequencies = ctx.saved_tensors
    return *turn(dq, dk, positions, ctx.theta, not ctx.back, frequencies, ctx.scale), None, None, None, *[None] * ctx.more


turn = direct(turn_op, _turn, _save, _differentiate)
