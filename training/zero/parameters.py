"""Parameters in DeepSpeed's hands: whole for a while, and still in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from models.init import roles
from training.zero import patches


@contextmanager
def gathered(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context in which parameters that ZeRO-3 splits are whole, and one rank alone may run the module."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters), patches.without_hooks(module):
        yield


def assert_fp32(parameters: dict[str, nn.Parameter]) -> None:
    """DeepSpeed must have left the parameters of recurrences in fp32."""
    cast = [name for name, p in parameters.items() if "keep_fp32" in roles(p) and p.dtype != torch.float32]
    assert not cast, f"recurrence parameters must stay fp32, but DeepSpeed cast {cast}"
