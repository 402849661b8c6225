"""Checkpoints as they lie on a disk: how they are found, verified and loaded into a model. Whole or not there at all, the same for any number of
ranks and any ZeRO stage, nothing pickled.

A folder checkpoints/step-XXXXXXXX holds model.safetensors (fp32), optimizer.safetensors (Adam's moments by parameter name),
config.json (the model), run.json (the run), state.json (step, tokens, data fingerprint), rng.safetensors, tokenizer.json and,
written last, COMPLETE.json with the size and SHA-256 of every other file and the number of checkpoints that the run folder had
got before it. It is written under a temporary name and renamed. The newest is the one written last, whatever its step: who
went back to an older one is on a new branch, and no clock is asked, as those of machines differ.
Several ranks write model-00001-of-0000N.safetensors and so on, each its part, and model.index.json and optimizer.index.json
say where the stretches of every tensor lie. Training writes them and reads the moments; models/hub/weights.py reads the tensors of both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer

from data.errors import UserError
from models.config import ModelConfig
from models.hub.importing import is_foreign, read_stock, without_tokenizer
from models.hub.weights import Weights, read_object, refuse_pickles
from models.lm import LanguageModel

MARKER = "COMPLETE.json"
ATTEMPTS = 5  # at reading a checkpoint of a run that goes on and drops old ones

T = TypeVar("T")


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    result = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            result.update(block)
    return result.hexdigest()


def folder_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def order_of(folder: Path) -> int:
    """The place of a checkpoint among those of its run folder in the order they were written, from 1; 0 where the marker does not say."""
    try:
        return int(json.loads((folder / MARKER).read_text())["order"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, in the order in which they were written."""
    folders = (run_dir / "checkpoints").glob("step-*")
    complete = [p for p in folders if re.fullmatch(r"step-\d+", p.name) and (p / MARKER).exists()]
    return sorted(complete, key=lambda p: (order_of(p), step_of(p)))


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def verify(folder: Path, rank: int = 0, size: int = 1, only: Callable[[str], bool] = lambda name: True) -> str:
    """'' when the files are as the marker says, else one sentence. Of `size` ranks each reads every size-th file; `only` chooses by name."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        files = sorted(marker["files"].items(), key=lambda item: (-item[1]["bytes"], item[0]))
        if marker["format"] not in (1, 2):
            return f"{folder} is of format {marker['format']}, this program reads 1 and 2."
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder} is not a complete checkpoint."
    for name, entry in [item for item in files if only(item[0])][rank::size]:
        path = folder / name
        try:
            if not path.exists() or path.stat().st_size != entry["bytes"]:
                return f"{path} is missing or cut short."
            if digest(path) != entry.get("sha256"):
                return f"{path} does not have the content it was saved with."
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}."
    return ""


def newest(run_dir: Path, warn: Callable[[str], Any] = print, only: Callable[[str], bool] = lambda name: True) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named through `warn` and passed over, and those that the run itself drops or
    replaces meanwhile are not damaged."""
    damaged: set[tuple[Path, int]] = set()
    while True:
        complete = [(folder, order_of(folder)) for folder in checkpoints(run_dir)]
        candidates = [item for item in complete if item not in damaged]
        if not candidates:
            return None
        folder, order = candidates[-1]
        problem = verify(folder, only=only)
        if not problem:
            return folder
        if (folder / MARKER).exists() and order_of(folder) == order:
            damaged.add((folder, order))
            warn(f"passing over a damaged checkpoint: {problem}")


def find(path: str | Path) -> Path:
    """The folder with the weights behind a run folder, a checkpoint, or an exported folder. Raises UserError."""
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"There is no {folder}; give a run folder, a checkpoint folder, or a folder with model.safetensors and config.json."
        )
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder that holds model.safetensors and config.json, or the run folder.")
    if folder.name == "checkpoints" and checkpoints(folder.parent):
        raise UserError(f"{folder} holds the checkpoints of a run; give the run folder {folder.parent}, or one of the checkpoints.")
    if (folder / "checkpoints").is_dir():
        last = newest(folder, only=lambda name: not name.startswith("optimizer"))
        if last is None:
            raise UserError(f"{folder} holds no complete checkpoint yet.")
        return last
    if not any((folder / name).exists() for name in ("model.safetensors", "model.index.json")) or not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model.safetensors with a config.json.")
    return folder


def find_and_read(path: str | Path, read: Callable[[Path], T]) -> T:
    """`read(find(path))`; where a run in progress drops that checkpoint under the reader, the newest is read instead. Raises UserError."""
    for _ in range(ATTEMPTS):
        folder = find(path)
        try:
            return read(folder)
        except Exception:  # each library has its own for a file that is gone
            if folder == Path(path) or (folder / MARKER).exists():
                raise
    raise UserError(
        f"The run in {path} drops its checkpoints before they can be read; give one of its milestones or a larger checkpoint.keep."
    )


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def read_config(folder: Path) -> ModelConfig:
    """The model of a checkpoint folder. Raises UserError with a sentence for every problem."""
    values = read_object(folder / "config.json")
    try:
        return ModelConfig.from_dict(values)
    except UserError as error:
        raise UserError([f"{folder / 'config.json'}: {problem}" for problem in error.problems]) from error


@torch.no_grad()
def load_weights(folder: Path, model: LanguageModel) -> None:
    """Loads the weights of a checkpoint into `model`, a tensor at a time. Raises UserError when the shapes or names are another model's."""
    weights, ours = Weights(folder), model.state_dict()
    theirs = {name: weights.shape(name) for name in weights.names()}
    wrong = sorted(k for k in ours.keys() | theirs.keys() if k not in ours or k not in theirs or tuple(ours[k].shape) != theirs[k])
    wrong = [k for k in wrong if not (k not in theirs and k in ours and _is_tied(model, k))]
    if wrong:
        raise UserError(
            f"{folder} holds another model: {len(wrong)} parameter(s) differ, the first is {wrong[0]}; give the model= and size= it was trained with, or another run_dir."
        )
    for name in theirs:
        ours[name].copy_(weights.tensor(name))


def _is_tied(model: LanguageModel, name: str) -> bool:
    return name not in dict(model.named_parameters())


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """(model in eval mode, tokenizer, meta) of a run, checkpoint or exported folder; fp32 weights on `device`.

    meta: 'folder' (where the weights lay), and for a run's checkpoint 'state' (state.json) and 'run' (run.json). Raises UserError in one sentence for anything that is not such a folder.
    """
    if is_foreign(Path(path)):
        model, tokenizer, meta = _read_model(Path(path), True)
    else:
        model, tokenizer, meta = find_and_read(path, lambda folder: _read_model(folder, False))
    return model.to(device).eval(), tokenizer, meta


def _read_model(folder: Path, foreign: bool) -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    refuse_pickles(folder)
    tensors: dict[str, torch.Tensor] = {}
    if foreign:
        config, tensors = read_stock(folder)
    else:
        config = read_config(folder)
    model = LanguageModel(config)
    if foreign:
        model.load_state_dict(tensors, strict=False)
    else:
        load_weights(folder, model)
    if not (folder / "tokenizer.json").exists():
        raise UserError(without_tokenizer(folder))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    meta: dict[str, Any] = {"folder": str(folder)}
    for name in ("state", "run"):
        if (folder / f"{name}.json").exists():
            meta[name] = json.loads((folder / f"{name}.json").read_text())
    return model, tokenizer, meta
