"""Products of which nobody reads the outputs: where activations are computed again, the last product is wanted for what it keeps alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Reading(threading.local):
    nobody = False


_reading = _Reading()


@contextmanager
def unread() -> Iterator[None]:
    """Inside, in this thread, joined products (op.py) are spared, and their outputs hold anything. Other products run as ever."""
    before, _reading.nobody = _reading.nobody, True
    try:
        yield
    finally:
        _reading.nobody = before


def is_unread() -> bool:
    return _reading.nobody
