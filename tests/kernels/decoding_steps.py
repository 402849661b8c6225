"""What every kernel of a decoding step is held to, on a CPU in the interpreter: the written-out step's numbers, inputs that stay as they are, and the
same bits in place and with a state that is dense in another order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def check_step(
    step: Callable[..., Sequence[Tensor]], arguments: Sequence[Any], wanted: Sequence[Tensor], state_at: int, names: Sequence[str], least: float,
    label: object,
) -> None:  # fmt: skip
    """step(*arguments, in_place=...) returns tensors of these names, the last of which is the state, arguments[state_at] (B, H, ., .); wanted: in fp64.
    least: error beside 1 + the largest number that fp32 may make, above the rounding of what is returned."""
    before = [a.clone() for a in arguments if isinstance(a, Tensor)]
    found = step(*arguments)
    same = (torch.equal(a, b) for a, b in zip(before, (a for a in arguments if isinstance(a, Tensor))))
    assert all(same), "an input was written over"
    assert [t.dtype for t in found] == [arguments[0].dtype, arguments[0].dtype, torch.float32]
    for name, a, b in zip(names, found, wanted):
        rounding = float((b.to(a.dtype).double() - b).abs().max()) if a.dtype != torch.float32 else 0.0
        limit = 1.01 * rounding + least * (1 + float(b.abs().max()))
        assert float((a.double() - b).abs().max()) <= limit, (label, name, float((a.double() - b).abs().max()), limit)
    state = arguments[state_at]
    turned = state.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)  # dense in another order
    again = step(*arguments, in_place=True)
    assert again[2] is state and all(torch.equal(a, b) for a, b in zip(again, found)), "in place"
    if state.numel() > 1:
        moved = (*arguments[:state_at], turned, *arguments[state_at + 1 :])
        assert all(torch.equal(a, b) for a, b in zip(step(*moved), found)), "strides"
        again = step(*moved, in_place=True)
        assert again[2] is turned and all(torch.equal(a, b) for a, b in zip(again, found)), "strides, in place"
    print(label, flush=True)
