"""Ctrl-C while a program loads its libraries ends it with a word and status 130, as it does later, not with the traceback of an import.

Every package of the project calls `quiet` when it is imported for a program (`python -m PACKAGE.PROGRAM`), before anything large is loaded;
as a library it changes nothing. Of what is large this module imports numpy alone, and only then.
"""

from __future__ import annotations

import atexit
import os
import sys
from types import TracebackType

INTERRUPTED = 130  # as shells count it: 128 and the number of SIGINT


def is_program() -> bool:
    """Whether the interpreter is looking for the module of `python -m MODULE` right now: until it is found, sys.argv[0] is '-m'."""
    return sys.argv[:1] == ["-m"]


def quiet() -> None:
    """From here on an interrupt that nobody catches is told in one line, and the status is INTERRUPTED."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        print("\ninterrupted", file=sys.stderr, flush=True)
        atexit._run_exitfuncs()
        os._exit(INTERRUPTED)  # the interpreter would end itself by the signal instead

    sys.excepthook = hook
    import numpy  # noqa: F401  torch would load it from C++, where an interrupt counts as a numpy that is missing, and the program goes on
