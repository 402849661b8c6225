"""What is left where a command used to lie."""

from __future__ import annotations

import sys


def moved(command: str) -> int:
    """The whole program: says in a sentence that it is started as `python -m COMMAND` now; returns its exit status, 2."""
    print(f"error: This command has moved; run python -m {command} with the same arguments.", file=sys.stderr)
    return 2
