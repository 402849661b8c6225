"""The schema of a run, and the checks that turn every mistake in it into one sentence each, all reported together.

The YAML files under configs/ hold the values; the dataclasses here say which keys exist, their types and what may be combined.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any

from data.fields import close_to, nearest, read
from training.config import checks, ranges, recipe, suggest
from training.config.ranges import AMOUNT, COUNT, MINUTES, POSITIVE, SHARE, Range
from training.errors import UserError
from training.schedule import KINDS, lr_factor

STARTS = ("zero", "pass", "random", "fitted")  # of training.initial_state, which needs torch
PRECISIONS = ("fp32", "bf16")


@dataclass
class TrainSection:
    seq_len: Annotated[int, Range(1, 2**31 - 2)] = 256
    global_batch: Annotated[int, Range(1, 10**7)] = 32
    micro_batch: Annotated[int, Range(1, 10**7)] = 8
    steps: Annotated[int | None, COUNT] = 300
    tokens: Annotated[float | None, Range(1, 10**18)] = None
    precision: str = "fp32"
    grad_clip: Annotated[float, Range(0, hint="0 switches clipping off")] = 1.0
    compile: bool = False
    cuda_graph: str = "auto"
    activation_checkpointing: str = "none"
    initial_state: str = "zero"
    initial_sigma: Annotated[float, Range(0)] = 1.0
    initial_drop: Annotated[float, SHARE] = 0.1
    device: str = "auto"
    check_memory: bool = True
    log_every: Annotated[int, COUNT] = 10
    resume: str = "auto"
    start_from: str | None = None
    start_with: str = "weights"


@dataclass
class ParallelSection:
    sequence: Annotated[int, Range(1, 10**6)] = 1


@dataclass
class CheckpointSection:
    every: Annotated[int, Range(0, ranges.MANY, hint="0 saves only at the end and when the run is stopped")] = 0
    keep: Annotated[int, COUNT] = 2
    milestones: list[Annotated[int, COUNT]] = field(default_factory=list)
    at_end: bool = True
    background: bool = True
    hook: str = ""
    hook_minutes: Annotated[float, MINUTES] = 10.0


@dataclass
class FaultSection:
    policy: str = "stop"
    max_skips: Annotated[int, AMOUNT] = 10
    spike_factor: Annotated[float, Range(0, hint="0 leaves spikes alone")] = 0.0
    spike_window: Annotated[int, Range(8, 10**6)] = 64


@dataclass
class DataSection:
    path: Any = "runs/data/demo"
    reader: str = "windows"
    prefetch: Annotated[int, Range(1, 10**4)] = 4
    task: dict[str, Any] = field(default_factory=dict)  # of reader=synthetic, see data/synthetic
    curriculum: Annotated[int, AMOUNT] = 0


@dataclass
class OptimSection:
    """lr: None for the one that goes with the size and the model, see `training.config.recipe`."""

    lr: Annotated[float | None, POSITIVE] = None
    weight_decay: Annotated[float, Range(0)] = 0.1
    betas: list[Annotated[float, SHARE]] = field(default_factory=lambda: [0.9, 0.95])
    eps: Annotated[float, POSITIVE] = 1e-8


@dataclass
class ScheduleSection:
    kind: str = "cosine"
    unit: str = "steps"
    warmup: Annotated[float, Range(0)] = 0.1
    decay: Annotated[float, Range(0)] = 0.2
    final: Annotated[float, SHARE] = 0.1


@dataclass
class DeepSpeedSection:
    stage: Annotated[int, Range(0, 3)] = 1
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    nvme_path: str | None = None
    hpz: Annotated[int, Range(1, 10**6)] = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False
    bucket_bytes: Annotated[int, Range(1024, 2**40)] = 200_000_000
    timeout_minutes: Annotated[float, MINUTES] = 30.0


@dataclass
class LoggingSection:
    wandb: str = "disabled"
    wandb_project: str = "everywhen"
    wandb_entity: str | None = None
    tensorboard: bool = False


@dataclass
class EvalSection:
    every: Annotated[int, Range(0, ranges.MANY, hint="0 evaluates only at the end")] = 0
    tokens: Annotated[int, COUNT] = 65536
    sample_every: Annotated[int, Range(0, ranges.MANY, hint="0 writes a sample only at the end")] = 0
    sample_prompt: str = "The "
    sample_tokens: Annotated[int, Range(1, 10**6)] = 60
    lengths: list[Annotated[int, Range(1, 2**31 - 2)]] = field(default_factory=list)  # of generated tasks
    long_length: Annotated[int, Range(0, 2**40, hint="0 draws none")] = 0
    long_rows: Annotated[int, Range(1, 10**6)] = 8


@dataclass
class Config:
    """One run. `model` is a models.config.ModelConfig mapping; `size` only feeds interpolations inside `model`, and the learning rate."""

    name: str = "dev"
    run_dir: str = "runs/dev"
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    dry_run: bool = False
    profile: bool = False
    profile_start: Annotated[int, COUNT] = 5
    profile_steps: Annotated[int, Range(1, 10**6)] = 3
    model: dict[str, Any] = field(default_factory=dict)
    size: dict[str, Any] = field(default_factory=dict)
    train: TrainSection = field(default_factory=TrainSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    faults: FaultSection = field(default_factory=FaultSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    eval: EvalSection = field(default_factory=EvalSection)

    def __post_init__(self) -> None:
        self.at = Position()

    @property
    def total_steps(self) -> int:
        """The number of the run's last optimizer step: its first step and `train.steps`, or as many whole steps as `train.tokens` takes."""
        if self.train.steps is not None:
            return self.at.first_step + self.train.steps
        assert self.train.tokens is not None
        left = int(self.train.tokens) - (self.at.tokens - self.at.first_tokens)
        return max(self.at.first_step + 1, self.at.step + max(0, -(-left // self.tokens_per_step)))

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.train.seq_len

    @property
    def span(self) -> float:
        """What the schedule runs over, in optimizer steps of the present size; of a run that counts tokens not always a whole number."""
        if self.schedule.unit == "steps":
            return self.total_steps - self.at.first_step
        return (self.at.tokens - self.at.first_tokens) / self.tokens_per_step + self.total_steps - self.at.step

    def in_steps(self, amount: float) -> int:
        """A schedule length in steps: a number below 1 is a fraction of the run, else steps or tokens as `schedule.unit` says."""
        if amount < 1:
            return round(amount * self.span)
        return round(amount if self.schedule.unit == "steps" else amount / self.tokens_per_step)

    @property
    def peak_lr(self) -> float:
        assert self.optim.lr is not None, "check() gives every run its rate"
        return self.optim.lr

    def lr_at(self, step: int, tokens: int) -> float:
        """The learning rate of the step after `step` steps and `tokens` tokens; `schedule.unit` says which of the two counts."""
        s = self.schedule
        place = step - self.at.first_step if s.unit == "steps" else (tokens - self.at.first_tokens) / self.tokens_per_step
        return self.peak_lr * lr_factor(
            place, self.span, kind=s.kind, warmup=self.in_steps(s.warmup), decay=self.in_steps(s.decay), final=s.final
        )


@dataclass
class Position:
    """Where a run is taken up: optimizer steps and tokens behind it, and where its own began (those of the run it was forked from come before)."""

    step: int = 0
    tokens: int = 0
    first_step: int = 0
    first_tokens: int = 0


def schema_keys(schema: type, prefix: str = "", kind: type | None = None) -> list[str]:
    """The dotted keys of a dataclass and those in it, all or those of one `kind` (or null); free mappings count as one."""
    keys = []
    for key, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            keys += schema_keys(typing.cast(type, hint), f"{prefix}{key}.", kind)
        elif kind is None or hint is kind or kind in typing.get_args(hint) and typing.get_origin(hint) is not list:
            keys.append(prefix + key)
    return keys


def _advice(path: str, key: str, known: list[str]) -> str:
    """How the sentence for a key that there is not ends: a near miss among its neighbours, the same name elsewhere, or what there is."""
    near = close_to(key, known, 0.8)
    return f"did you mean {near!r}?" if near else suggest.key(path, schema_keys(Config)) or nearest(key, known)


def _quotes(path: str, value: Any) -> str:
    """How a list that was meant as text is written on the command line."""
    return f"; text is quoted: {suggest.quoted(path, '[' + ','.join(map(str, value)) + ']')}" if isinstance(value, (list, tuple)) else ""


def parse(mapping: dict[str, Any], schema: type, path: str, problems: list[str]) -> Any:
    """An instance of dataclass `schema` from `mapping`; unknown keys and wrong types keep their defaults and are added to `problems`."""
    return schema(**read(mapping, typing.get_type_hints(schema), path, problems, advice=_advice, hint_for_text=_quotes))


def _choices(config: Config) -> list[str]:
    rows: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("train.precision", config.train.precision, PRECISIONS),
        ("train.cuda_graph", config.train.cuda_graph, ("auto", "off")),
        ("train.activation_checkpointing", config.train.activation_checkpointing, ("none", "full")),
        ("data.reader", config.data.reader, ("windows", "stream", "synthetic")),
        ("train.initial_state", config.train.initial_state, STARTS),
        ("schedule.kind", config.schedule.kind, KINDS),
        ("schedule.unit", config.schedule.unit, ("steps", "tokens")),
        ("deepspeed.offload_optimizer", config.deepspeed.offload_optimizer, ("none", "cpu", "nvme")),
        ("deepspeed.offload_parameters", config.deepspeed.offload_parameters, ("none", "cpu", "nvme")),
        ("faults.policy", config.faults.policy, ("stop", "skip")),
        ("train.device", config.train.device, ("auto", "cpu", "cuda")),
        ("train.start_with", config.train.start_with, ("weights", "all")),
        ("logging.wandb", config.logging.wandb, ("online", "offline", "disabled")),
    ]
    return [f"{key} is {value!r}; choose one of {', '.join(map(str, allowed))}." for key, value, allowed in rows if value not in allowed]


def _combinations(config: Config, world_size: int) -> list[str]:
    problems, t, ds = [], config.train, config.deepspeed
    if (t.steps is None) == (t.tokens is None):
        problems.append(
            "Give the length of the run once: train.steps or train.tokens, and null for the other (train.steps=null train.tokens=1e9)."
        )
    N = config.parallel.sequence
    if config.dry_run:  # asks what a run on other machines would cost
        world_size = N
    replicas = world_size // N if N > 0 and world_size % N == 0 else world_size
    rows = t.micro_batch * replicas
    if rows > 0 and t.global_batch % rows:
        whom = f"{replicas} rank(s)" if replicas == world_size else f"{replicas} group(s) of {N} ranks"
        problems.append(f"train.global_batch {t.global_batch} is not a multiple of train.micro_batch {t.micro_batch} x {whom} = {rows}.")
    if N > 1:
        problems += _sequence(config, world_size)
    if ds.offload_parameters != "none" and ds.stage != 3:
        problems.append(f"deepspeed.offload_parameters needs deepspeed.stage=3, not {ds.stage}.")
    if ds.offload_optimizer != "none" and ds.stage == 0:
        problems.append("deepspeed.offload_optimizer needs deepspeed.stage of 1, 2 or 3.")
    problems += _zero(config, world_size)
    if config.checkpoint.hook and "{folder}" not in config.checkpoint.hook:
        problems.append(
            "checkpoint.hook does not say {folder}; write where the checkpoint goes into the command, as in 'cp -r {folder} /backup'."
        )
    if len(config.optim.betas) != 2 or 1 in config.optim.betas:
        problems.append(f"optim.betas must be two numbers from 0 up to, but not, 1, not {config.optim.betas}.")
    if 0 < config.faults.spike_factor <= 1:
        problems.append(f"faults.spike_factor {config.faults.spike_factor} must be above 1, or 0 to leave spikes alone.")
    if t.start_from and t.resume not in ("auto", "none"):
        problems.append("train.start_from begins a new run and train.resume goes on with one; give one of them.")
    if t.start_with == "all" and not t.start_from:
        problems.append("train.start_with says what train.start_from takes from a checkpoint; give that as well.")
    if t.start_from and config.model.get("init_from"):
        problems.append("train.start_from and model=hf: both give the first weights; leave one of them out.")
    empty = {"name": config.name, "run_dir": config.run_dir, "train.resume": t.resume, "train.start_from": t.start_from}
    problems += [
        f"{key} is empty; give it a value, or leave it out." for key, value in empty.items() if value is not None and not value.strip()
    ]
    return problems


def _zero(config: Config, world_size: int) -> list[str]:
    """Offload to disk and ZeRO++: what they need and cannot be combined with."""
    problems, ds = [], config.deepspeed
    if "nvme" in (ds.offload_optimizer, ds.offload_parameters):
        if ds.stage != 3:
            problems.append(f"Offload to nvme needs deepspeed.stage=3, not {ds.stage}.")
        if not ds.nvme_path:
            problems.append("Offload to nvme needs deepspeed.nvme_path, a folder on a fast local disk.")
    plus = {"hpz": ds.hpz > 1, "quantized_weights": ds.quantized_weights, "quantized_gradients": ds.quantized_gradients}
    problems += [f"deepspeed.{key} needs deepspeed.stage=3, not {ds.stage}." for key, on in plus.items() if on and ds.stage != 3]
    if ds.hpz > 1 and world_size % ds.hpz and not config.dry_run:
        problems.append(f"deepspeed.hpz {ds.hpz} does not divide the {world_size} rank(s) of this run; use the number of ranks of a node.")
    if ds.quantized_weights and config.train.precision != "fp32":
        problems.append(
            "DeepSpeed does not quantise weights under autocast: set deepspeed.quantized_weights=false or train.precision=fp32."
        )
    return problems


def _sequence(config: Config, world_size: int) -> list[str]:
    """What keeps sequences from being cut over ranks, the mixers left out."""
    problems, t, N = [], config.train, config.parallel.sequence
    if world_size % N:
        problems.append(
            f"parallel.sequence {N} does not divide the {world_size} rank(s) of this run; change it or start a multiple of {N}."
        )
    if t.seq_len % N:
        problems.append(f"parallel.sequence {N} does not divide train.seq_len {t.seq_len}; change one.")
    if t.initial_state != "zero":
        problems.append(f"parallel.sequence above 1 needs train.initial_state=zero, not {t.initial_state}.")
    return problems


def split_problems(config: Config) -> list[str]:
    """The mixers that cannot have their time cut over the ranks of parallel.sequence, a sentence each."""
    import torch

    from models import mixers
    from models.config import ModelConfig
    from models.hub.importing import resolved

    N, problems = config.parallel.sequence, []
    model = ModelConfig.from_dict({**resolved(config.model), "vocab_size": config.model.get("vocab_size") or 256})
    for name in dict.fromkeys(model.pattern):
        with torch.device("meta"):
            mixer = mixers.build(model.mixers[name], model.d_model, 0)
        reason = mixer.why_not_split(config.train.seq_len // N)
        if reason:
            problems.append(
                f"parallel.sequence {N}: mixer {name} cannot be split over ranks, as {reason}; set it to 1 or change the mixer."
            )
    return problems


def check(mapping: dict[str, Any], world_size: int = 1) -> Config:
    """The validated Config of a resolved mapping. Raises UserError with every problem found."""
    problems: list[str] = []
    config = parse(mapping, Config, "", problems)
    readable = not problems
    if readable:
        checks.at_home(config)
    told = [text.split()[0] for text in problems]
    outside = [text for text in ranges.problems(config) if text.split()[0] not in told]
    problems += outside + ranges.loose(config.size, "size")
    if readable:
        problems += _choices(config) + _combinations(config, world_size) + ([] if outside else checks.lengths(config))
    problems += model_problems(config.model)
    if config.data.reader == "synthetic":
        problems += task_problems(config)
    else:
        problems += checks.data(config)
    if not problems and config.parallel.sequence > 1:
        problems += split_problems(config)
    if problems:
        raise UserError(problems)
    if config.optim.lr is None:
        config.optim.lr = recipe.rate(config)[0]
    return config


def task_problems(config: Config) -> list[str]:
    """Problems of generated data: the task's own, and lengths and seeds it cannot have."""
    from data.synthetic import build_task
    from data.synthetic.source import SyntheticReader

    try:
        task = build_task(config.data.task)
        SyntheticReader(task, config.train.seq_len, config.seed, curriculum=config.data.curriculum)
    except ValueError as error:
        return str(error).splitlines()
    least = task.min_length()
    return [f"eval.lengths holds {n}, which is too short for the task; it needs {least} or more." for n in config.eval.lengths if n < least]


def model_problems(mapping: dict[str, Any]) -> list[str]:
    """Problems of the model section alone; the vocabulary may still be open (it comes from the shards)."""
    from models.config import ModelConfig

    try:
        if "init_from" in mapping:
            from models.hub.importing import resolved

            mapping = resolved(mapping)
        ModelConfig.from_dict({**mapping, "vocab_size": mapping.get("vocab_size") or 256})
    except ValueError as error:
        return str(error).splitlines()
    return []
