"""A stock Llama-shaped or Mamba-2 folder, or one that this project exported, as a checkpoint for evaluation, generation and export.

    python -m scripts.import_checkpoint FOLDER OUT [verify=false]
    python train.py model=hf:FOLDER [model.verify=false] ...      # training goes on from its weights, without an import

Nothing is unpickled and no code of the folder is run. What a stock config says that our models do not have is refused by name, and logits that
are not those of transformers' own class are refused too, unless verify=false leaves that comparison out (it takes the model twice in memory, in fp32).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.program import Parser, program
from models.hub.importing import import_folder, without_tokenizer
from models.hub.weights import read_object


def main(words: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    parser = Parser("scripts.import_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out")
    parser.add_argument("verify", nargs="?", default="verify=true", choices=("verify=true", "verify=false"))
    return program(parser.format_help(), lambda words: run(parser.parse_args(words)), words)


def run(values: argparse.Namespace) -> None:
    """What the command line asks for. Raises UserError."""
    verify = values.verify == "verify=true"
    out = import_folder(values.folder, values.out, verify)
    ours = read_object(values.folder / "config.json")["model_type"] == "everywhen"
    compared = "" if ours else ": logits agree with those of transformers' own class"
    print(f"wrote {out}{compared if verify else ', NOT COMPARED with transformers (verify=false): its numbers may be wrong'}")
    if note := without_tokenizer(values.folder):
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
