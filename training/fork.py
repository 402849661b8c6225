"""train.start_from: a new run that begins from a checkpoint of this program, with data, length, schedule, batch and bounds of its own.

Its run folder, its history, its wandb run and the counting of train.steps are its own. With train.start_with=weights it starts at step 0; with `all`
Adam's moments and the step go on too, and so do the data where they are the same: they are not read a second time.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from models.hub.importing import is_foreign
from training import checkpoint, cursor
from training.config.schema import Config
from training.cursor import Cursor
from training.errors import UserError
from training.world import World


def found(named: str, world: World, key: str) -> Path:
    """The whole checkpoint (or, to begin from, imported folder) that `key`=`named` means: a run folder's newest, or itself; all ranks verify it
    together. Raises UserError."""
    folder, kind = Path(named), ""
    if world.main:  # ranks may see a shared disk at different moments, so that only one of them looks
        kind = _kind(folder)
    kind = world.texts(kind)[0]
    what = "resume from" if key == "train.resume" else "begin from"
    if kind == "nothing":
        instead = ", or train.resume=auto" if key == "train.resume" else ""
        raise UserError(f"There is no {folder} to {what}; give a run folder or a checkpoint folder{instead}.")
    if kind == "foreign":
        raise UserError(f"{folder} is a Hugging Face folder, no checkpoint of this program; begin from its weights with model=hf:{folder}.")
    if kind == "run":
        newest = checkpoint.newest_together(folder, world)
        if newest is None:
            raise UserError(
                f"{folder} holds no complete checkpoint yet; give another run folder{' or train.resume=none' if key == 'train.resume' else ''}."
            )
        return newest
    if kind == "imported" and key == "train.start_from":
        return folder
    problems = [text for text in world.texts(checkpoint.verify(folder, world.rank, world.size)) if text]
    if problems:
        raise UserError(problems[0])
    return folder


def _kind(folder: Path) -> str:
    if not folder.exists():
        return "nothing"
    if (folder / "checkpoints").is_dir():
        return "run"
    if (folder / checkpoint.MARKER).exists():
        return "checkpoint"
    if (folder / "config.json").is_file():
        return "foreign" if is_foreign(folder) else "imported" if not (folder / "state.json").exists() else "checkpoint"
    return "checkpoint"


def refuse_own(config: Config) -> None:
    """Raises UserError where the run folder is that of the run to begin from: the new run would go on with the old one."""
    assert config.train.start_from
    source, run_folder = Path(config.train.start_from).resolve(), Path(config.run_dir).resolve()
    if run_folder == source or run_folder in source.parents:
        raise UserError(
            f"train.start_from={config.train.start_from} lies in the run folder {config.run_dir} itself; give the new run another name or run_dir."
        )


def refuse_another_optimizer(config: Config, folder: Path) -> None:
    """Raises UserError where the moments of `folder`, which are to go on, are those of another optimizer."""
    theirs, wanted = (settings_of(folder).get("optim") or {}).get("kind", "adamw"), config.optim.kind
    if theirs != wanted:
        raise UserError(
            f"{folder} holds the moments of optim={theirs}, not of {wanted}; go on with optim={theirs}, "
            f"or begin a new run from its weights: train.start_from={folder} run_dir=NEW_FOLDER."
        )


def origin_of(config: Config) -> str:
    return str(Path(config.train.start_from or "").resolve())


def refuse_another(config: Config, earlier: Cursor, folder: Path) -> None:
    """Raises UserError where the run folder holds a run that did not begin from train.start_from, which would be passed over."""
    if earlier.origin != origin_of(config):
        began = f"began from {earlier.origin}" if earlier.origin else "began from nothing"
        raise UserError(
            f"{folder} is of a run that {began}, not from train.start_from={config.train.start_from}; give the new run another name or run_dir, "
            "or leave train.start_from out to go on with the old one."
        )


def begun(folder: Path, config: Config, fingerprints: list[str], weights: list[float]) -> tuple[Cursor, str]:
    """(the cursor of a new run that begins from `folder`, what it takes from there). Raises UserError."""
    fresh = cursor.begin(config, weights)
    fresh.origin = origin_of(config)
    if config.train.start_with == "weights":
        return fresh, "the weights"
    if not (folder / "state.json").exists():
        raise UserError(f"{folder} holds weights alone; begin from it with train.start_with=weights.")
    state = checkpoint.read_state(folder)
    old = cursor.read(state, settings_of(folder), config)
    told = "weights, optimizer and step; other data, from their first sample on"
    if state["fingerprint"] == fingerprints:
        try:
            same = copy.deepcopy(old)
            cursor.take_on(same, config, weights, str(folder))
            fresh, told = same, f"weights, optimizer and step; the data go on behind sample {same.samples:,}"
        except UserError:
            told = "weights, optimizer and step; the same data in another form, from their first sample on"
    fresh.origin = origin_of(config)
    fresh.step, fresh.tokens, fresh.first_step, fresh.first_tokens = old.step, old.tokens, old.step, old.tokens
    return fresh, told


def settings_of(folder: Path) -> dict[str, Any]:
    """run.json of a checkpoint, {} where it has none."""
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Raises UserError when the checkpoint's tokenizer numbers texts otherwise than that of the data."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        if Tokenizer.from_file(str(path)).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{folder} has another tokenizer than the data; prepare the data with tokenizer={path}.")
