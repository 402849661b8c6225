"""Says whether Triton kernels can run; importing this never imports Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Triton kernels run in its interpreter, on CPU tensors (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_triton(device: torch.device) -> str:
    """Empty if Triton kernels can run on tensors of this device, else one sentence."""
    if device.type != "cuda" and not interpreted():
        return "Triton kernels need tensors on a GPU."
    if not INSTALLED:
        return "Triton is not installed."
    return ""
