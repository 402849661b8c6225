"""How a program ends other than by finishing.

UserError (data/errors.py): a mistake a user can mend; its sentences and exit status 2, never a traceback. Stopped: a run that was asked to stop has
saved; exit status 75 (EX_TEMPFAIL of sysexits.h: try again), so that whoever started it knows that the same command goes on.
"""

from __future__ import annotations

from data.errors import FILES, FULL, RIGHTS, UserError, reason_of, sentence_of

__all__ = ["FILES", "FULL", "RIGHTS", "STOPPED", "Stopped", "UserError", "reason_of", "sentence_of"]

STOPPED = 75  # as a status


class Stopped(Exception):
    """Raised at the end of a run that stopped before its last step, when everything is saved and closed."""
