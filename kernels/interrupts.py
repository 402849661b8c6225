"""Ctrl-C while a program loads its libraries ends it with a word and status 130, as it does later, not with the traceback of an import.

Every package of the project calls `quiet` when it is imported for a program (`python -m PACKAGE.PROGRAM`), before anything large is loaded;
as a library it changes nothing. Of what is large this module imports numpy alone, and only then.

A KeyboardInterrupt inside of an import may not get out of it: torch loads Python modules from C++, where it ends in an abort, or counts as a module
that is missing, so that the program goes on without. So none is raised there: before a program has begun it ends at once, later when the import is
done, or at a second one.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import FrameType, TracebackType

INTERRUPTED = 130  # as shells count it: 128 and the number of SIGINT
LATER = 0.05  # seconds until it is looked again whether an import is done
_begun = False
_waits = False  # an interrupt, for the end of an import


def is_program() -> bool:
    """Whether the interpreter is looking for the module of `python -m MODULE` right now: until it is found, sys.argv[0] is '-m'."""
    return sys.argv[:1] == ["-m"]


def begin() -> None:
    """The program has loaded what it needs to begin; from now on it may have something to put away when it is interrupted."""
    global _begun
    _begun = True


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
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
    import numpy  # noqa: F401  before torch does


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _waits
    again, _waits = _waits and number == signal.SIGINT, False
    if again or not _importing(frame):
        raise KeyboardInterrupt
    if not _begun:
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    _waits = True
    signal.setitimer(signal.ITIMER_REAL, LATER)


def _importing(frame: FrameType | None) -> bool:
    """Whether a frame is within an import."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
