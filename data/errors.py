"""What a user can mend, told from what is a fault of the program.

Every floor raises ValueError where it is given what it cannot use. One whose message is meant for the person at the terminal, and says there what to
change, is a UserError: programs (data/program.py) print its sentences and end with status 2. Any other exception, a plain ValueError too, is a
fault of the program and keeps its traceback. A library may catch both as ValueError.
"""

from __future__ import annotations

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
FILES = (errno.EMFILE, errno.ENFILE)
RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


class UserError(ValueError):
    """Carries one sentence per problem; all problems found are reported together."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def sentence_of(error: OSError) -> str:
    """What a disk, a port or the rights of this user did not allow, as one sentence."""
    if error.filename is None:
        return f"The operating system refused: {reason_of(error)}."
    known = f" to {error.filename2}" if error.filename2 else ""
    helped = "" if error.errno in FULL + FILES else "; give another place, or make this one readable and writable"
    return f"{error.filename}{known} cannot be read or written: {reason_of(error)}{helped}."


def reason_of(error: OSError) -> str:
    """Why the operating system refused, and what helps where that is the same everywhere."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.errno in FULL:
        return f"{reason}; free space there and start again"
    return f"{reason}; allow more with ulimit -n 1024" if error.errno in FILES else reason
