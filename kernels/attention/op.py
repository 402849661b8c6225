"""The op everywhen::attention. Saved for backward are queries, keys, values, outputs, and one logarithm a query and head."""

from typing import Any

import torch
from torch import Tensor

from kernels.attention import launch, reference
from kernels.op import define


def _forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    return launch.forward(q, k, v, first, window, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return launch.time_first(q.shape, q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(
    d: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, last: Tensor | None, y: Tensor, lse: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_lse is not looked at: callers get the outputs alone."""
    return launch.backward(d, q, k, v, first, last, y, lse, window, scale)


def _fake_backward(*saved: Any) -> tuple[Tensor, ...]:
    return tuple(launch.time_first(t.shape, t) for t in saved[2:5])


def _save(inputs: Any, output: Any) -> tuple[Any, Any]:
    return (*inputs[:5], *output), inputs[5:]


attention, attention_op = define(
    "attention",
    _forward,
    _fake,
    _backward,
    reference=reference.attention,
    reference_backward=reference.attention_backward,
    fake_backward=_fake_backward,
    save=_save,
    materialize=False,
)
