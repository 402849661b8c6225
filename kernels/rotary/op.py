"""The op everywhen::rotary, whose backward turns the other way. Saved for backward are the positions.

Legend: B batch, T time, H query heads, G key heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import no_triton
from kernels.op import define
from kernels.rotary import reference

Pair = tuple[Tensor, Tensor]


def use_triton(q: Tensor, k: Tensor) -> bool:
    return q.dtype != torch.float64 and q.dtype == k.dtype and not no_triton(q.device)


def _forward(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, back: bool, frequencies: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, K) and k (B, G, T, K) turned by `positions` (T,), or back by them; views of contiguous (B, T, heads, K)."""
    from kernels.rotary import triton

    return triton.launch(q, k, positions, theta, back, frequencies, scale)


def _reference(
    q: Tensor, k: Tensor, positions: Tensor, theta: float, back: bool, frequencies: Tensor | None = None, scale: float = 1.0
) -> Pair:
    return reference.rotary(q, k, -positions if back else positions, theta, frequencies, scale)


def _fake(q: Tensor, k: Tensor, *settings: Any) -> Pair:
    turned = [x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k)]
    return turned[0], turned[1]


def _backward(
    dq: Tensor, dk: Tensor, positions: Tensor, frequencies: Tensor | None, theta: float, back: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from kernels.rotary import triton

    return triton.launch(dq, dk, positions, theta, not back, frequencies, scale, joined=True)


def _reference_backward(
    dq: Tensor, dk: Tensor, positions: Tensor, frequencies: Tensor | None, theta: float, back: bool, scale: float
) -> Pair:
    return _reference(dq, dk, positions, theta, not back, frequencies, scale)


def _save(inputs: tuple[Any, ...], output: Pair) -> tuple[tuple[Tensor, Tensor | None], tuple[Any, ...]]:
    _, _, positions, theta, back, frequencies, scale = (*inputs, None, 1.0)[:7]
    return (positions, frequencies), (theta, back, scale)


turn, turn_op = define(
    "rotary", _forward, _fake, _backward, reference=_reference, reference_backward=_reference_backward, fake_backward=_fake, save=_save
)
