"""What holds while a CUDA graph is recorded, by whoever records one."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Python's collector of cycles waits. A recorded training step and its graph hold one another, so the collector lets them go, whenever it comes by;
    the end of a graph is not permitted while another is recorded, and voids that recording ("operation failed due to a previous error during capture").
    torch collects before a recording no longer (from 2.9 on, pull request 161037)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
