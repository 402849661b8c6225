"""Writes a checkpoint as a Hugging Face folder that transformers loads without this project.

    python -m scripts.export CHECKPOINT OUT [--shard-size 5GB] [--dtype fp32|bf16|fp16] [--licence apache-2.0] [--evals DIR] [--push org/name]

CHECKPOINT: a run folder or a checkpoint. The folder is written under a temporary name, loaded in a fresh process by transformers alone, compared
with the checkpoint (logits, greedy text, tokenizer, config), and only then renamed to OUT. The optimizer is never read. Without --dtype an
imported checkpoint keeps the dtypes it came with, and any other is written in fp32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.errors import UserError
from data.program import Parser, program
from evals.report.card import evaluation
from models.checkpoint import find, read_config
from models.hub.export import GREEDY, export
from models.hub.importing import without_tokenizer
from models.hub.native import stock
from models.hub.push import check_name, check_token, push


def main(words: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    parser = Parser("scripts.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--shard-size", default="5GB")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; without it that of an imported checkpoint, else fp32")
    parser.add_argument("--licence", default="apache-2.0")
    parser.add_argument("--evals", metavar="DIR", type=Path, help="a folder that evals.run wrote (OUT or OUT/MODEL), for the model card")
    parser.add_argument("--push", metavar="org/name")
    return program(parser.format_help(), lambda words: run(parser.parse_args(words)), words)


def run(values: argparse.Namespace) -> None:
    """What the command line asks for. Raises UserError."""
    if values.push:  # before the work of an export
        check_name(values.push)
        check_token()
    if values.evals is not None and not values.evals.is_dir():
        raise UserError(f"{values.evals} is no folder; give the one that evals.run wrote.")
    folder = export(
        values.checkpoint,
        values.out,
        shard_size=values.shard_size,
        dtype=values.dtype,
        licence=values.licence,
        evaluate=lambda source: evaluation(source, values.evals),
    )
    print(f"wrote {values.out}: loaded by transformers in a fresh process; logits, {GREEDY} greedy tokens, config and tokenizer agree")
    if reason := stock(read_config(find(values.checkpoint)))[1]:
        print(f"note: the folder brings its own code, as the model is no stock class of transformers: {reason}", file=sys.stderr)
    if note := without_tokenizer(folder):
        print(f"note: {note}", file=sys.stderr)
    if values.push:
        print(f"pushed: {push(folder, values.push)}")


if __name__ == "__main__":
    sys.exit(main())
