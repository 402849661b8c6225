"""Uploads an exported folder to the Hub as one commit.

The token is the one of `hf auth login`, or HF_TOKEN. When the upload is interrupted nothing is visible yet; the next one goes on with what is missing.
The command is scripts/push.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from data.errors import UserError
from kernels.moved import moved

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def check_name(repository: str) -> None:
    """Raises UserError unless `repository` reads org/name as the Hub allows it."""
    if not NAME.fullmatch(repository) or "--" in repository or ".." in repository or repository.endswith((".git", ".", "-")):
        raise UserError(f"The repository name is {repository!r}; write it as org/name with letters, digits, '-', '_' and '.'.")


def check_token() -> None:
    """Raises UserError unless there is a token to write with."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("There is no Hub token; run `hf auth login` or set HF_TOKEN.")


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Creates the repository if it is not there, uploads the folder, and returns the commit's address. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    folder = Path(folder)
    check_name(repository)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json; export the checkpoint first.")
    check_token()
    api, again = HfApi(), f"`python -m scripts.push {folder} {repository}` goes on with it."
    try:
        api.create_repo(repository, exist_ok=True, private=private)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model", ignore_patterns=[".*"])
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise UserError(f"The Hub does not let this token write to {repository}; use a token with write access to it.") from error
        raise UserError(f"The Hub refused the upload to {repository} (status {status}); {again}") from error
    except Exception as error:  # the client's transport raises its own kinds
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The upload to {repository} was interrupted ({words}); {again}") from error
    return str(done.commit_url)


if __name__ == "__main__":
    sys.exit(moved("scripts.push"))
