"""How much memory the device of a run has."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CONTEXT = 0.5 * 2**30  # the least that a CUDA context takes beside torch's allocator


def device_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of main memory as this machine (and the container around this process) has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory - CONTEXT
    return main_memory()


def main_memory() -> float:
    """Bytes of main memory that processes of this machine can have: what the kernel has, or the limit of the control group."""
    limits = [float(os.sysconf("SC_PAGE_SIZE")) * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(float(Path(name).read_text()))
        except (OSError, ValueError):  # "max", or no such file
            continue
    return min(limits)
