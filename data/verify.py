"""Reads token shards whole and compares them with what was written: after copying them, or where a disk is doubted.

    python -m data.verify DIR [DIR ...]

Training and evaluation look at sizes, at the tokenizer, at ids beyond the vocabulary and at where documents begin; that an id has become another one
only the checksums of meta.json show, which are compared here. Exit status: 0 all as written, 2 something is damaged (a line for each split) or a
mistake, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data.errors import UserError
from data.program import program
from data.shards import SPLITS, ShardSet, read_meta


def run(words: list[str]) -> int:
    """What the command line asks for. Raises UserError with a sentence for each split that is damaged."""
    if not words:
        print(__doc__, file=sys.stderr)
        return 2
    problems = []
    for folder in words:
        meta = read_meta(Path(folder))
        for split in SPLITS:
            if not meta.get("splits", {}).get(split, {}).get("tokens"):
                continue
            try:
                shards = ShardSet(folder, split)
                shards.verify()
            except UserError as error:
                problems += error.problems
            else:
                print(f"{folder} {split}: {shards.n_documents:,} documents, {shards.n_tokens:,} tokens, as they were written", flush=True)
    if problems:
        raise UserError(problems)
    return 0


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return program(__doc__, run, words)


if __name__ == "__main__":
    sys.exit(main())
