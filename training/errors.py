"""UserError: a mistake a user can mend. It ends a program with its sentences and exit status 2, never a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Carries one sentence per problem; all problems found are reported together."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
