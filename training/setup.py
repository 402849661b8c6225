"""From a checked Config to the parts of a run: shards, the model's own config, and where to take up training."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.files import lock, write_json
from data.loader import build_reader
from data.prompted import PromptReader
from data.shards import ShardSet
from data.synthetic import build_task
from data.synthetic.source import SyntheticReader, SyntheticSet
from data.tokenizer import marks_of
from models.config import ModelConfig
from models.hub.importing import load_into, read_stock, resolved
from models.lm import LanguageModel
from training import checkpoint, fork
from training.config.changes import compared, differences, finished, keep_history, lr_jump
from training.config.checks import NO_DATA, notes
from training.config.recipe import rate
from training.config.schema import Config
from training.cursor import Cursor, Order, begin, read, take_on
from training.errors import UserError
from training.launch import world_size
from training.watch.metrics import environment
from training.world import World
from training.zero.policy import zero_run

Shards = list[tuple[ShardSet, float]]
DRY_RUN_VOCABULARY = 50432  # GPT-NeoX's 50,280 tokens rounded up
TOTAL = "\0"  # stands for the total in a sentence that is written before it is known


def open_shards(path: Any, split: str) -> Shards:
    """The weighted shard sets of data.path (one folder, or {folder: weight}). Raises UserError."""
    if not path:
        raise UserError(NO_DATA)
    weights = path if isinstance(path, dict) else {path: 1.0}
    places: dict[Path, str] = {}
    for folder in weights:
        place = Path(folder).resolve()
        if place in places:
            raise UserError(
                f"data.path names one folder twice, as {places[place]} and as {folder}; give it once, with the sum of its weights."
            )
        places[place] = folder
    shards = [(ShardSet(folder, split), float(weight)) for folder, weight in weights.items()]
    of_tokens: dict[str, str] = {}
    for folder, (shard, _) in zip(weights, shards):
        if (other := of_tokens.setdefault(shard.fingerprint, folder)) != folder:
            raise UserError(
                f"data.path names {folder}, which holds the very tokens of {other}; give one of them, with the sum of their weights."
            )
    tokenizers = {s.tokenizer_sha256 for s, _ in shards}
    if len(tokenizers) > 1:
        raise UserError(f"The folders of data.path were made with {len(tokenizers)} different tokenizers; prepare them again with one.")
    return shards


def open_sources(config: Config, split: str) -> Any:
    """What data.reader reads: a generated task, or the shard sets of data.path. Raises UserError."""
    if config.data.reader != "synthetic":
        return open_shards(config.data.path, split)
    return [(SyntheticSet(config.data.task, split), 1.0)]


def open_reader(config: Config, shards: Shards, order: Order | None = None) -> Any:
    """The reader of data.reader over `shards`; order: of a run that goes on. Raises UserError when there is too little data for it."""
    order = order or begin(config, [weight for _, weight in shards]).order
    if config.data.reader == "synthetic":
        return SyntheticReader(build_task(config.data.task), order.seq_len, order.seed, curriculum=config.data.curriculum)
    reader = build_reader(shards, order.reader, order.seq_len, order.seed, order.rows, order.stretches)
    if not config.prompt:
        return reader
    return PromptReader(reader, config.prompt, config.data.prompt_mask, shards[0][0].eot_id, order.seed)


def open_data(config: Config) -> tuple[Any, Any, str]:
    """(sources, reader, ''), or (None, None, why not): a rank that cannot read its data must not leave the others waiting for it."""
    try:
        shards = open_sources(config, "train")
        return shards, open_reader(config, shards), ""
    except UserError as error:
        if world_size() == 1:
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
    """Where training begins: without a folder at step 0, else from a checkpoint. moments: the folder's optimizer and random states go on too;
    locks: rank 0's lock of the run folder, open as long as the run."""

    cursor: Cursor
    folder: Path | None
    moments: bool
    wandb_id: str | None
    message: str
    locks: list[Any]


def take_up(config: Config, world: World, model: LanguageModel, shards: Shards, resolved_yaml: str) -> Start:
    """Finds the checkpoint to go on or to begin from, loads its weights, sets `config.at`, and writes config and environment into the run folder.

    Folders of a mixture that the checkpoint names in another order are put into its order. Raises UserError when the checkpoint is of another
    model, or goes on with other data.
    """
    run_dir, now = Path(config.run_dir), OmegaConf.to_container(OmegaConf.create(resolved_yaml))
    assert isinstance(now, dict)
    locks: list[Any] = []
    if config.train.start_from:
        fork.refuse_own(config)
    fresh = not run_dir.exists()

    def claim() -> None:
        _refuse_what_is_no_run(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        locks.append(lock(run_dir))  # ranks that outlived their launcher would write the same files

    world.on_main(run_dir, claim)
    try:
        folder, moments = _checkpoint_of(config, world), True
        begins = folder is None and bool(config.train.start_from)
        if begins:
            folder, moments = fork.found(config.train.start_from or "", world, "train.start_from"), config.train.start_with == "all"
        if folder is None:
            cursor, where, wandb_id = _from_nothing(config, world, model, shards)
        else:
            cursor, where, wandb_id = _read(folder, begins, config, world, model, shards)
    except UserError:
        if fresh and locks:
            _leave(run_dir, locks)
        raise
    config.at = cursor.position()
    before = fork.settings_of(folder) if folder is not None else {}
    changes = differences(*compared(before, {str(k): v for k, v in now.items()}, folder, model.config)) if folder and before else []
    told = [*_told(config, world, model, cursor, where), *_changed(config, cursor, before if moments else {}, changes)]

    def write() -> None:
        facts = environment(world.device)
        row = {"step": cursor.step, "samples": cursor.samples, "tokens": cursor.tokens, "from": folder and str(folder), "changes": changes}
        keep_history(run_dir, resolved_yaml, {**row, "command": facts["command"], "commit": facts["commit"], "ranks": world.size})
        write_json(run_dir / "environment.json", facts)

    world.on_main(run_dir, write)  # not before here: a refused start leaves what the run folder says of its run
    return Start(cursor, folder, moments, wandb_id, "\n".join(told), locks)


@contextlib.contextmanager
def loading_the_optimizers() -> Iterator[None]:
    """Loads in a thread what torch's optimizers load when they are made (torch.compile, seconds of Python) while the weights are drawn inside,
    which takes no Python."""
    thread = threading.Thread(target=importlib.import_module, args=("torch._dynamo",))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _refuse_what_is_no_run(folder: Path) -> None:
    """A run would write its files among those of a checkpoint, an exported model or token shards."""
    kinds = {checkpoint.MARKER: "a checkpoint", "model.safetensors": "the folder of a model", "meta.json": "a folder of token shards"}
    kind = next((kind for name, kind in kinds.items() if (folder / name).is_file()), None)
    if kind is not None:
        raise UserError(
            f"run_dir={folder} is {kind}; give the run a folder of its own, and name what it goes on from with train.resume= or "
            "train.start_from=, or what it reads with data.path=."
        )


def _leave(run_dir: Path, locks: list[Any]) -> None:
    """Takes back a run folder that this start has made and nothing was written into."""
    locks.pop().close()
    with contextlib.suppress(OSError):
        (run_dir / "lock").unlink()
        run_dir.rmdir()


def _from_nothing(config: Config, world: World, model: LanguageModel, shards: Shards) -> tuple[Cursor, str, None]:
    """What `_read` returns, of a run without a checkpoint, whose weights are drawn here and nowhere else; weights of a folder that model=hf: names are compared by one rank and loaded by all."""
    model.init_weights(config.seed)
    origin, told = config.model.get("init_from"), f"starting at step 0{TOTAL}"
    if origin:
        verify = bool(config.model.get("verify", True))
        world.on_main(Path(config.run_dir), lambda: verify and read_stock(origin))
        load_into(origin, model, shards[0][0].tokenizer() if config.data.reader != "synthetic" else None, verify=False)
        told += f" from the weights of {origin}"
        told += _other_start(Path(str(origin)), shards[0][0]) if config.data.reader != "synthetic" else ""
        told += "" if verify else f"\n{origin} was NOT COMPARED with transformers (model.verify=false): its numbers may be wrong"
    return begin(config, [weight for _, weight in shards]), told, None


def _other_start(folder: Path, shards: Any) -> str:
    """A line where the documents of the data begin with another token than those that the folder's model has read."""
    if not (folder / "tokenizer.json").is_file():
        return ""
    theirs = marks_of(shards.tokenizer(), folder).start
    if theirs is None or theirs == shards.eot_id:
        return ""
    name = shards.tokenizer().id_to_token
    return (
        f"\nnote: documents of {shards.directory} begin with {name(shards.eot_id)!r}, those that {folder} was trained on with {name(theirs)!r}; "
        f"prepare the data with tokenizer={folder} to keep to that."
    )


def _changed(config: Config, cursor: Cursor, before: dict[str, Any], changes: list[str]) -> list[str]:
    """The lines about what a start changes. before: the settings that the checkpoint's learning rate followed, {} where it starts anew."""
    told = ["settings that differ from the checkpoint's:", *(f"  {line}" for line in changes)] if changes else []
    told += cursor.notes
    if cursor.step >= config.total_steps:
        return [*told, finished(config, cursor)]
    told += filter(None, [lr_jump(before, config, cursor) if before else ""])
    return told + [f"note: {text}." for text in notes(config)]


def _read(folder: Path, begins: bool, config: Config, world: World, model: LanguageModel, shards: Shards) -> tuple[Cursor, str, str | None]:
    """(cursor, where training is taken up in words, the wandb run to go on with) of a checkpoint whose weights are loaded into `model`."""
    run_dir = Path(config.run_dir)
    try:
        if not begins or config.train.start_with == "all":
            fork.refuse_another_optimizer(config, folder)
        prints, weights = [s.fingerprint for s, _ in shards], [weight for _, weight in shards]
        if begins:
            cursor, what = fork.begun(folder, config, prints, weights)
            fork.check_tokenizer(folder, shards[0][0].tokenizer())
            checkpoint.load_weights(folder, model)
            return cursor, f"a new run from {folder}: {what}; at step {cursor.step}", None
        state = checkpoint.read_state(folder)
        _in_order(state["fingerprint"], shards, folder)
        cursor = read(state, fork.settings_of(folder), config)
        if config.train.start_from:
            fork.refuse_another(config, cursor, folder)
        take_on(cursor, config, [weight for _, weight in shards], str(folder))
        checkpoint.load_weights(folder, model)
    except Exception as error:
        if (folder / checkpoint.MARKER).exists() or begins and folder.exists():
            raise
        raise UserError(f"{folder} was dropped by its run while it was read; start again, or resume from one of its milestones.") from error
    by_name = config.train.resume != "auto"
    branches = world.texts(_branches(run_dir, folder, by_name) if world.main else "")[0]
    elsewhere = run_dir.resolve() not in folder.resolve().parents
    forked = elsewhere or by_name and bool(branches)  # what another wandb run says already is not written over
    return cursor, f"resuming from {folder} at step {cursor.step}{TOTAL}{branches}", None if forked else state.get("wandb_id")


def _in_order(fingerprints: list[str], shards: Shards, folder: Path) -> None:
    """Puts `shards` into the order of `fingerprints`. Raises UserError when they are other data."""
    left, placed = list(shards), []
    for wanted in fingerprints:
        place = next((i for i, (shard, _) in enumerate(left) if shard.fingerprint == wanted), None)
        placed += [left.pop(place)] if place is not None else []
    if left or len(placed) != len(fingerprints):
        raise UserError(
            f"{folder} was trained on other data than {', '.join(str(s.directory) for s, _ in shards)}; "
            f"give that, or begin a new run from it: train.start_from={folder} run_dir=NEW_FOLDER."
        )
    shards[:] = placed


def _told(config: Config, world: World, model: LanguageModel, cursor: Cursor, where: str) -> list[str]:
    """The lines that a start prints: what runs, from where, and by which learning rate."""
    counts = sum(model.parameter_counts().values())
    zero = zero_run(config, world.size)
    what = f"{config.name}: {counts:,} parameters on {world.size} x {world.device.type}, {zero}, {config.train.precision}, run folder {config.run_dir}"
    total = f" of {config.total_steps}"
    where = where.replace(TOTAL, total) if TOTAL in where else where + total
    s, warmup = config.schedule, config.in_steps(config.schedule.warmup)
    source = rate(config)
    rates = f"learning rate {config.peak_lr:g} ({source[1]})" if config.peak_lr == source[0] else f"learning rate {config.peak_lr:g}"
    each = config.tokens_per_step if s.unit == "tokens" else 1
    decay = f", {config.in_steps(s.decay) * each:,} of decay" if s.kind == "wsd" else ""
    lines = [what, where, f"{rates}, schedule {s.kind} over {round(config.span * each):,} {s.unit}, {warmup * each:,} of warm-up{decay}"]
    compiling = "torch.compile is on: the first step compiles the model, which takes minutes for a large one and is no hang."
    return [*lines, compiling] if config.train.compile else lines


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


def _refuse_what_is_all_damaged(run_dir: Path, newest: Path | None, world: World) -> None:
    """A run none of whose checkpoints can be read must not begin anew as if it had none, and drop them. Raises UserError on all ranks."""
    there = checkpoint.checkpoints(run_dir) if world.main and newest is None else []
    which = world.texts(", ".join(folder.name for folder in there))[0]
    if which:
        raise UserError(
            f"Every checkpoint of {run_dir} is damaged ({which}); put back a copy of one, or begin anew with another run_dir or train.resume=none."
        )


def _checkpoint_of(config: Config, world: World) -> Path | None:
    """The folder that train.resume means; all ranks verify it together."""
    wanted = config.train.resume
    if wanted == "none":
        return None
    if wanted == "auto":
        newest = checkpoint.newest_together(Path(config.run_dir), world)
        _refuse_what_is_all_damaged(Path(config.run_dir), newest, world)
        return newest
    return fork.found(wanted, world, "train.resume")
