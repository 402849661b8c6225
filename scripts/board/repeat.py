"""What makes a cell give the same bits again, and a hash of the code that its bits depend on.

`use_deterministic_algorithms` with warn_only leaves attention its quickest backward pass, whose sums have no order: a cell of the board run again had
other weights. So training is strict, and what torch cannot do in order raises. Measuring has no backward pass, and only warns.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = ("kernels", "models", "training", "data", "scripts/board", "scripts/studies")


def repeatable(number: int, name: str) -> Any:
    """The device of process `number` (of several GPUs one after the other), set so that a cell gives the same bits again: sums in a fixed order, and a
    work space of its own for products on every stream."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if name != "cuda":
        return torch.device(name)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    device = torch.device("cuda", number % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """Inside, where `repeatable` was asked for, an operation without an order raises RuntimeError, and attention takes the one that has it."""
    import torch

    on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=on)


@functools.cache
def source_hash() -> str:
    """Of the Python files that a cell's bits may depend on. It is told, and does not decide whether a number counts: those are its settings."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(p for folder in SOURCES for p in (root / folder).rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
