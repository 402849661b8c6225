"""How a program ends other than by finishing.

UserError: a mistake a user can mend; its sentences and exit status 2, never a traceback. Stopped: a run that was asked to stop has saved; exit status
75 (EX_TEMPFAIL of sysexits.h: try again), so that whoever started it knows that the same command goes on.
"""

from __future__ import annotations


class UserError(ValueError):
    """Carries one sentence per problem; all problems found are reported together."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


STOPPED = 75  # as a status


class Stopped(Exception):
    """Raised at the end of a run that stopped before its last step, when everything is saved and closed."""


def sentence_of(error: OSError) -> str:
    """What a disk, a port or the rights of this user did not allow, as one sentence."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is None:
        return f"The operating system refused: {reason}."
    known = f" to {error.filename2}" if error.filename2 else ""
    return f"{error.filename}{known} cannot be read or written: {reason}; give another place, or make this one readable and writable."
