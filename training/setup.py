"""From a checked Config to the parts of a run: shards, the model's own config, and where to take up training."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.loader import build_reader
from data.shards import ShardSet
from data.synthetic import build_task
from data.synthetic.source import SyntheticReader, SyntheticSet
from models.config import ModelConfig
from models.hub.importing import load_into, read_stock, resolved
from models.lm import LanguageModel
from training import checkpoint
from training.config import Config
from training.engine import World, zero_run
from training.errors import UserError
from training.files import lock, write_json
from training.metrics import environment

Shards = list[tuple[ShardSet, float]]
DRY_RUN_VOCABULARY = 50432  # GPT-NeoX's 50,280 tokens rounded up


def open_shards(path: Any, split: str) -> Shards:
    """The weighted shard sets of data.path (one folder, or {folder: weight}). Raises UserError."""
    weights = path if isinstance(path, dict) else {path: 1.0}
    try:
        shards = [(ShardSet(folder, split), float(weight)) for folder, weight in weights.items()]
    except ValueError as error:
        raise UserError(str(error)) from error
    tokenizers = {s.tokenizer_sha256 for s, _ in shards}
    if len(tokenizers) > 1:
        raise UserError(f"The folders of data.path were made with {len(tokenizers)} different tokenizers; prepare them again with one.")
    return shards


def open_sources(config: Config, split: str) -> Any:
    """What data.reader reads: a generated task, or the shard sets of data.path. Raises UserError."""
    if config.data.reader != "synthetic":
        return open_shards(config.data.path, split)
    return [(SyntheticSet(config.data.task, split), 1.0)]


def open_reader(config: Config, shards: Shards) -> Any:
    """The reader of data.reader over `shards`. Raises UserError when there is too little data for it."""
    try:
        if config.data.reader == "synthetic":
            return SyntheticReader(build_task(config.data.task), config.train.seq_len, config.seed, curriculum=config.data.curriculum)
        return build_reader(shards, config.data.reader, config.train.seq_len, config.seed, config.train.global_batch)
    except ValueError as error:
        raise UserError(str(error)) from error


def open_data(config: Config) -> tuple[Any, Any, str]:
    """(sources, reader, ''), or (None, None, why not): a rank that cannot read its data must not leave the others waiting for it."""
    try:
        shards = open_sources(config, "train")
        return shards, open_reader(config, shards), ""
    except UserError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        return None, None, str(error)


def model_config(config: Config, shards: Shards | None) -> tuple[ModelConfig, str]:
    """(the model's config with its vocabulary settled, a note about where the vocabulary comes from)."""
    model = resolved(config.model)
    wanted, note = model.get("vocab_size"), ""
    if shards is None:
        try:
            shards = open_sources(config, "train")
        except UserError:
            note = "" if wanted else " (assumed: no shards at data.path)"
    if shards is not None:
        needed = shards[0][0].vocab_size
        if wanted is not None and wanted < needed:
            raise UserError(
                f"model.vocab_size={wanted} is smaller than the {needed} tokens of the shards' tokenizer; leave it null or raise it."
            )
        wanted = wanted or -(-needed // 64) * 64
    return ModelConfig.from_dict({**model, "vocab_size": wanted or DRY_RUN_VOCABULARY}), note


@dataclass
class Start:
    """Where training begins: step 0 without a folder, or the step of a checkpoint. held: rank 0's lock of the run folder, for the run."""

    step: int
    folder: Path | None
    wandb_id: str | None
    message: str
    held: list[Any]


def take_up(config: Config, world: World, model: LanguageModel, shards: Shards, resolved_yaml: str) -> Start:
    """Finds the checkpoint to go on from, loads its weights, and writes config and environment into the run folder.

    Raises UserError when the checkpoint is of another model or other data.
    """
    run_dir = Path(config.run_dir)
    held: list[Any] = []

    def own() -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        held.append(lock(run_dir))  # ranks that outlived their launcher would write the same files

    _on_main(world, run_dir, own)
    folder = _checkpoint_of(config, world)
    if folder is not None:
        try:
            state = checkpoint.read_state(folder)
            if state["fingerprint"] != [s.fingerprint for s, _ in shards]:
                raise UserError(
                    f"{folder} was trained on other data than {', '.join(str(s.directory) for s, _ in shards)}; "
                    "give that, or train.resume=none with another run_dir."
                )
            checkpoint.load_weights(folder, model)
        except Exception as error:
            if (folder / checkpoint.MARKER).exists():
                raise
            raise UserError(f"{folder} was dropped by its run while it was read; start again, or resume from one of its milestones.") from error

    def settings() -> None:
        (run_dir / "config.yaml").write_text(resolved_yaml)
        write_json(run_dir / "environment.json", environment(world.device))

    _on_main(world, run_dir, settings)  # not before here: a refused start leaves what the run folder says of its run
    counts = sum(model.parameter_counts().values())
    zero = zero_run(config, world.size)
    what = f"{config.name}: {counts:,} parameters on {world.size} x {world.device.type}, {zero}, {config.train.precision}, run folder {run_dir}"
    if folder is None:
        origin = config.model.get("init_from")
        if origin:
            verify = bool(config.model.get("verify", True))
            _on_main(world, run_dir, lambda: verify and read_stock(origin))
            load_into(origin, model, shards[0][0].tokenizer() if config.data.reader != "synthetic" else None, verify=False)
            what += "" if verify else f"\n{origin} was NOT COMPARED with transformers (model.verify=false): its numbers may be wrong"
        told = f"{what}\nstarting at step 0 of {config.total_steps}{f' from the weights of {origin}' if origin else ''}"
        return Start(0, None, None, told, held)
    branches = _branches(run_dir, folder, config.train.resume != "auto") if world.main else ""
    message = f"{what}\nresuming from {folder} at step {state['step']} of {config.total_steps}{branches}"
    return Start(state["step"], folder, state.get("wandb_id"), message, held)


def _on_main(world: World, run_dir: Path, write: Callable[[], Any]) -> None:
    """`write()` on rank 0. Raises UserError on every rank when the run folder does not take it."""
    problem = ""
    if world.main:
        try:
            write()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"The run folder {run_dir} cannot be written: {error.strerror}."
    problem = world.texts(problem)[0]
    if problem:
        raise UserError(problem)


def _branches(run_dir: Path, chosen: Path, by_name: bool) -> str:
    """A sentence where the run folder holds checkpoints of higher steps than `chosen`, which is the one written last or asked for by name."""
    limit, order = checkpoint.read_state(chosen)["step"], checkpoint.order_of(chosen)
    higher = [f for f in checkpoint.checkpoints(run_dir) if checkpoint.step_of(f) > limit and (by_name or checkpoint.order_of(f) < order)]
    if not higher:
        return ""
    last = max(higher, key=checkpoint.step_of)
    if by_name:
        return f"; what is saved from here on counts as newer than {last.name} of this run folder"
    return f", the one saved last; {last.name} is of a branch that was left before, and train.resume={last} would go back to it"


def _checkpoint_of(config: Config, world: World) -> Path | None:
    """The folder that train.resume means; all ranks verify it together."""
    wanted = config.train.resume
    if wanted == "none":
        return None
    if wanted == "auto":
        return checkpoint.newest_together(Path(config.run_dir), world)
    folder, kind = Path(wanted), ""
    if world.main:  # ranks may see a shared disk at different moments, so that only one of them looks
        kind = "run" if (folder / "checkpoints").is_dir() else "checkpoint" if folder.exists() else "nothing"
    kind = world.texts(kind)[0]
    if kind == "nothing":
        raise UserError(f"There is no {folder} to resume from; give a run folder or a checkpoint folder, or train.resume=auto.")
    if kind == "run":
        found = checkpoint.newest_together(folder, world)
        if found is None:
            raise UserError(f"{folder} holds no complete checkpoint yet; give another run folder or train.resume=none.")
        return found
    problems = [text for text in world.texts(checkpoint.verify(folder, world.rank, world.size)) if text]
    if problems:
        raise UserError(problems[0])
    return folder
