"""Where DeepSpeed's flat memory lies: whether tensors are views of it, which patches rely on that leave them as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def assert_within(flat: Tensor, parts: Iterable[Tensor], what: str) -> None:
    """`parts`, empty ones aside, must begin in the memory of `flat`."""
    begin, end = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    assert all(begin <= part.data_ptr() < end or not part.numel() for part in parts), f"{what} do not lie in their group"
