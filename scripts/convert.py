"""A trained model with other mixers in the place of some of its attention, which begin from the attention's weights.

    python -m scripts.convert checkpoint=runs/quickstart layers=3 to=mamba2 out=out/hybrid [text=FILE] [random=false] [scale=1] [seed=0]
    python train.py model=hf:out/hybrid distill.teacher=runs/quickstart train.steps=1000

`checkpoint` is a run, a checkpoint, or a folder that model=hf: reads. `to` is mamba2, delta or a cell (`gru`, `paragru`, ...). `layers`: numbers with
commas, half (every second attention, from the first on) or all. text: a file or folder of texts, on whose first 4,096 tokens it is
measured how large the attention's outputs are, which the new mixers' are then made to be at first; wanted where many layers are replaced. random=true:
the new mixers begin anew, to compare with. scale: a factor of what new mixers with a norm put out at first. The folder that is written is an exported
one, which transformers loads too; until it is trained on it says little. docs/methods/conversion.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.files import check_absent, check_writable, new_folder, save_tensors
from data.tokenizer import no_unknown_token, reader_of
from evals.inputs.texts import corpus_of_file
from models.checkpoint import load_model
from models.convert import converted, sizes_of, targets
from models.hub.export import write_folder
from training.config.arguments import parse_arguments, program
from training.errors import UserError

MEASURED = 4096  # tokens of a text
DEFAULTS: dict[str, Any] = {
    "checkpoint": None,
    "layers": "half",
    "to": "mamba2",
    "out": None,
    "text": None,
    "random": False,
    "scale": 1.0,
    "seed": 0,
}


def problems_of(values: dict[str, Any]) -> list[str]:
    """What cannot be run, a sentence each."""
    problems = [
        f"Say {what}: {key}=DIR." for key, what in (("checkpoint", "what to convert"), ("out", "where to write it")) if not values[key]
    ]
    if not 0 < values["scale"] <= 10:
        problems.append(f"scale must be above zero and at most 10, not {values['scale']:g}.")
    if values["to"] not in targets():
        problems.append(f"to is {values['to']!r}; choose one of {', '.join(targets())}.")
    if values["layers"] not in ("half", "all") and not all(part.strip().isdigit() for part in values["layers"].split(",")):
        problems.append(f"layers is {values['layers']!r}; give half, all, or the numbers of layers with commas between them.")
    return problems


def chosen(words: str, config: Any) -> list[int]:
    """The layers that `layers=` means."""
    if words not in ("half", "all"):
        return sorted({int(part) for part in words.split(",")})
    attentions = [i for i in range(config.n_layers) if config.mixers[config.mixer_name(i)]["type"] == "attention"]
    return attentions[:: 2 if words == "half" else 1]


def start_of(file: str, tokenizer: Tokenizer) -> Tensor:
    """The first tokens of a text (R, T), R rows of 512 or one shorter; it is read as evaluation reads one. Raises UserError where there are none."""
    text = "\n\n".join(corpus_of_file(file, 16 * MEASURED).documents)
    with no_unknown_token():
        ids = reader_of(tokenizer).encode(text, add_special_tokens=False).ids[:MEASURED]
    if len(ids) < 16:
        raise UserError(f"{file} is too short to measure anything: it has {len(ids)} tokens.")
    T = min(512, len(ids))
    return torch.tensor(ids[: len(ids) // T * T]).view(-1, T)


def run(values: dict[str, Any]) -> Path:
    """Converts and writes; returns the folder. Raises UserError."""
    out = Path(values["out"])
    check_absent(out)
    check_writable(out.absolute().parent)
    teacher, tokenizer, meta = load_model(values["checkpoint"])
    layers = chosen(values["layers"], teacher.config)
    if not layers:
        raise UserError(f"{values['checkpoint']} has no attention to convert.")
    sizes = sizes_of(teacher, layers, start_of(values["text"], tokenizer)) if values["text"] else None
    student = converted(teacher, layers, values["to"], values["seed"], not values["random"], values["scale"], sizes)
    with new_folder(out) as whole, tempfile.TemporaryDirectory(dir=whole.parent) as made:
        source = Path(made)
        tied = {"head.weight"} if student.config.tie_embeddings else set()
        save_tensors(source / "model.safetensors", {k: v.contiguous() for k, v in student.state_dict().items() if k not in tied})
        (source / "config.json").write_text(json.dumps(student.config.to_dict(), indent=1) + "\n")
        (source / "tokenizer.json").write_text(tokenizer.to_str())
        for name in ("run.json", "tokenizer_config.json"):
            if (Path(meta["folder"]) / name).is_file():
                (source / name).write_bytes((Path(meta["folder"]) / name).read_bytes())
        write_folder(source, whole, None, 1 << 32, "other")
    print(f"wrote {out}: {values['to']} in layers {', '.join(map(str, layers))} of {teacher.config.n_layers}; go on with")
    print(f"  python train.py model=hf:{out} distill.teacher={values['checkpoint']}")
    return out


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module; returns the exit status."""
    return program(__doc__, lambda words: run(parse_arguments(words, DEFAULTS, problems_of)) and None, arguments)


if __name__ == "__main__":
    sys.exit(main())
