"""Uploads an exported folder to the Hub as one commit.

    python -m scripts.push FOLDER org/name [--private]

The token is the one of `hf auth login`, or HF_TOKEN. When the upload is interrupted nothing is visible yet; this command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys

from data.program import program
from models.hub.push import push


def main(words: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser("scripts.push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("repository")
    parser.add_argument("--private", action="store_true")
    return program(parser.format_help(), lambda words: run(parser.parse_args(words)), words)


def run(values: argparse.Namespace) -> None:
    """What the command line asks for. Raises UserError."""
    print(f"pushed: {push(values.folder, values.repository, values.private)}")


if __name__ == "__main__":
    sys.exit(main())
