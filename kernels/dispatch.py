"""Says whether Triton kernels can run, and how ops are to be called; importing this never imports Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # products and sums in one instruction: Triton 3.10 asks for it to be said
HAS_TRITON = importlib.util.find_spec("triton") is not None  # read when the module loads: torch.compile cannot trace reading it
_planning = _planning_compiled = False
# A kernel that is one of a chain may be launched before the one before it ends, and wait inside for its results, which hides the launch. None:
# where the device can. A decoding step on an H100 takes a fifth less time by it.
dependent_launch: bool | None = None


@contextmanager
def planning(compiled: bool = False) -> Iterator[None]:
    """Inside, tensors without storage count as tensors on a GPU: ops with fake implementations are chosen (training/cost/memory.py).
    compiled: as torch.compile sees them."""
    global _planning, _planning_compiled
    before, _planning, _planning_compiled = (_planning, _planning_compiled), True, compiled
    try:
        yield
    finally:
        _planning, _planning_compiled = before


def planned() -> bool:
    """Whether this is inside `planning`, where code that launches kernels outside a custom op returns empty tensors of the right shapes
    instead."""
    return _planning


def planned_compiled() -> bool:
    """Whether this is inside `planning(compiled=True)`, where implementations that cannot be traced are not chosen."""
    return _planning_compiled


def interpreted() -> bool:
    """Triton kernels run in its interpreter, on CPU tensors (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_triton(device: torch.device) -> str:
    """Empty if Triton kernels can run on tensors of this device, else one sentence."""
    if device.type != "cuda" and not interpreted() and not _planning:
        return "Triton kernels need tensors on a GPU."
    if not HAS_TRITON:
        return "Triton is not installed."
    return ""


def overlapped() -> bool:
    """Whether kernels of a chain are launched dependently."""
    if dependent_launch is not None:
        return dependent_launch
    return not interpreted() and not _planning and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def is_eager(tensor: Tensor) -> bool:
    """Whether ops run as they are called: nobody traces, and the tensor has storage."""
    return not torch.compiler.is_compiling() and type(tensor) in (Tensor, nn.Parameter)
