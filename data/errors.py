"""What a user can mend, told from what is a fault of the program.

Every floor raises ValueError where it is given what it cannot use. One whose message is meant for the person at the terminal, and says there what to
change, is a UserError: programs (data/program.py) print its sentences and end with status 2. Any other exception, a plain ValueError too, is a
fault of the program and keeps its traceback. A library may catch both as ValueError.
"""

from __future__ import annotations


class UserError(ValueError):
    """Carries one sentence per problem; all problems found are reported together."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def sentence_of(error: OSError) -> str:
    """What a disk, a port or the rights of this user did not allow, as one sentence."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    if error.filename is None:
        return f"The operating system refused: {reason}."
    known = f" to {error.filename2}" if error.filename2 else ""
    return f"{error.filename}{known} cannot be read or written: {reason}; give another place, or make this one readable and writable."
