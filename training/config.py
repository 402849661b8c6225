"""The schema of a run, and the checks that turn every mistake in it into one sentence each, all reported together.

The YAML files under configs/ hold the values; the dataclasses here say which keys exist, their types and what may be combined.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any

from training.errors import UserError
from training.schedule import KINDS

STARTS = ("zero", "pass", "random", "fitted")  # of training.initial_state, which needs torch
PRECISIONS = ("fp32", "bf16")


@dataclass
class TrainSection:
    seq_len: int = 256
    global_batch: int = 32
    micro_batch: int = 8
    steps: int | None = 300
    tokens: float | None = None
    precision: str = "fp32"
    grad_clip: float = 1.0
    compile: bool = False
    activation_checkpointing: str = "none"
    initial_state: str = "zero"
    initial_sigma: float = 1.0
    initial_drop: float = 0.1
    device: str = "auto"
    log_every: int = 10
    resume: str = "auto"


@dataclass
class ParallelSection:
    sequence: int = 1


@dataclass
class CheckpointSection:
    every: int = 0
    keep: int = 2
    milestones: list[int] = field(default_factory=list)
    at_end: bool = True
    background: bool = True
    hook: str = ""
    hook_minutes: float = 10.0


@dataclass
class FaultSection:
    policy: str = "stop"
    max_skips: int = 10
    spike_factor: float = 0.0
    spike_window: int = 64


@dataclass
class DataSection:
    path: Any = "runs/data/demo"
    reader: str = "windows"
    prefetch: int = 4
    task: dict[str, Any] = field(default_factory=dict)  # of reader=synthetic, see data/synthetic
    curriculum: int = 0


@dataclass
class OptimSection:
    lr: float = 3e-3
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8


@dataclass
class ScheduleSection:
    kind: str = "cosine"
    unit: str = "steps"
    warmup: float = 0.1
    decay: float = 0.2
    final: float = 0.1


@dataclass
class DeepSpeedSection:
    stage: int = 1
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    nvme_path: str | None = None
    hpz: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False
    bucket_bytes: int = 200_000_000
    timeout_minutes: float = 30.0


@dataclass
class LoggingSection:
    wandb: str = "disabled"
    wandb_project: str = "everywhen"
    wandb_entity: str | None = None
    tensorboard: bool = False


@dataclass
class EvalSection:
    every: int = 0
    tokens: int = 65536
    sample_every: int = 0
    sample_prompt: str = "The "
    sample_tokens: int = 60
    lengths: list[int] = field(default_factory=list)  # of generated tasks
    long_length: int = 0
    long_rows: int = 8


@dataclass
class Config:
    """One run. `model` is a models.config.ModelConfig mapping; `size` only feeds interpolations inside `model`."""

    name: str = "dev"
    run_dir: str = "runs/dev"
    seed: int = 0
    dry_run: bool = False
    profile: bool = False
    profile_start: int = 5
    profile_steps: int = 3
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

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run: `train.steps`, or `train.tokens` rounded up to whole steps."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.tokens is not None
        return max(1, -(-int(self.train.tokens) // self.tokens_per_step))

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.train.seq_len

    def in_steps(self, amount: float) -> int:
        """A schedule length in steps: a number below 1 is a fraction of the run, else steps or tokens as `schedule.unit` says."""
        if amount < 1:
            return round(amount * self.total_steps)
        return round(amount if self.schedule.unit == "steps" else amount / self.tokens_per_step)


def nearest(key: str, known: list[str]) -> str:
    """' Did you mean X?' for a near miss, else the list of what there is."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(sorted(known))}."


def _convert(value: Any, wanted: Any, path: str, problems: list[str]) -> Any:
    """`value` as type `wanted`, or a sentence in `problems`. An int passes for a float, a whole float (1e6) for an int."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union else (wanted,)
    if wanted is Any or (value is None and type(None) in options):
        return value
    for option in options:
        origin = typing.get_origin(option)
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
            return int(value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is float and isinstance(value, str):
            try:
                return float(value)  # YAML 1.1 reads 3e-4 as a string
            except ValueError:
                continue
        if option is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
        if origin is dict and isinstance(value, dict):
            return value
        if origin is list and isinstance(value, (list, tuple)):
            inner = typing.get_args(option)[0]
            return [_convert(item, inner, f"{path}[{i}]", problems) for i, item in enumerate(value)]
    names = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    problems.append(f"{path} must be {'an' if names[0] in 'aeiou' else 'a'} {names}, not {value!r}.")
    return value


def parse(mapping: dict[str, Any], schema: type, path: str, problems: list[str]) -> Any:
    """An instance of dataclass `schema` from `mapping`; unknown keys and wrong types are added to `problems`."""
    hints = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        where = f"{path}{key}"
        if key not in hints:
            problems.append(f"Unknown key {where!r}; {nearest(str(key), list(hints))}")
        elif dataclasses.is_dataclass(hints[key]):
            if isinstance(value, dict):
                values[key] = parse(value, typing.cast(type, hints[key]), f"{where}.", problems)
            else:
                problems.append(f"{where} must be a group of keys, not {value!r}.")
        else:
            values[key] = _convert(value, hints[key], where, problems)
    return schema(**values)


def _positive(config: Config) -> list[str]:
    t = config.train
    rows = {
        "train.seq_len": t.seq_len,
        "train.global_batch": t.global_batch,
        "train.micro_batch": t.micro_batch,
        "optim.lr": config.optim.lr,
        "checkpoint.hook_minutes": config.checkpoint.hook_minutes,
        "train.log_every": t.log_every,
        "parallel.sequence": config.parallel.sequence,
        "data.prefetch": config.data.prefetch,
        "checkpoint.keep": config.checkpoint.keep,
        "profile_start": config.profile_start,
        "profile_steps": config.profile_steps,
        "deepspeed.hpz": config.deepspeed.hpz,
        "deepspeed.timeout_minutes": config.deepspeed.timeout_minutes,
    }
    optional = {"train.steps": t.steps, "train.tokens": t.tokens}
    rows |= {key: value for key, value in optional.items() if value is not None}
    return [f"{key} must be above zero, not {value}." for key, value in rows.items() if value <= 0]


def _choices(config: Config) -> list[str]:
    rows: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("train.precision", config.train.precision, PRECISIONS),
        ("train.activation_checkpointing", config.train.activation_checkpointing, ("none", "full")),
        ("data.reader", config.data.reader, ("windows", "stream", "synthetic")),
        ("train.initial_state", config.train.initial_state, STARTS),
        ("schedule.kind", config.schedule.kind, KINDS),
        ("schedule.unit", config.schedule.unit, ("steps", "tokens")),
        ("deepspeed.stage", config.deepspeed.stage, (0, 1, 2, 3)),
        ("deepspeed.offload_optimizer", config.deepspeed.offload_optimizer, ("none", "cpu", "nvme")),
        ("deepspeed.offload_parameters", config.deepspeed.offload_parameters, ("none", "cpu", "nvme")),
        ("faults.policy", config.faults.policy, ("stop", "skip")),
        ("logging.wandb", config.logging.wandb, ("online", "offline", "disabled")),
    ]
    return [f"{key} is {value!r}; choose one of {', '.join(map(str, allowed))}." for key, value, allowed in rows if value not in allowed]


def _combinations(config: Config, world_size: int) -> list[str]:
    problems, t, ds = [], config.train, config.deepspeed
    if (t.steps is None) == (t.tokens is None):
        problems.append("Give the length of the run once: train.steps or train.tokens, and null for the other.")
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
    if t.initial_sigma < 0 or not 0 <= t.initial_drop <= 1:
        problems.append(
            f"train.initial_sigma must be zero or more and train.initial_drop between 0 and 1, not {t.initial_sigma} and {t.initial_drop}."
        )
    if config.eval.long_length < 0 or config.eval.long_rows < 1:
        problems.append("eval.long_length must be zero (none) or more and eval.long_rows above zero.")
    if config.checkpoint.hook and "{folder}" not in config.checkpoint.hook:
        problems.append("checkpoint.hook does not say {folder}; write where the checkpoint goes into the command, as in 'cp -r {folder} /backup'.")
    if len(config.optim.betas) != 2 or not all(0 <= b < 1 for b in config.optim.betas):
        problems.append(f"optim.betas must be two numbers from 0 up to 1, not {config.optim.betas}.")
    if config.faults.spike_factor and config.faults.spike_factor <= 1:
        problems.append(f"faults.spike_factor {config.faults.spike_factor} must be above 1, or 0 to leave spikes alone.")
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
        problems.append("DeepSpeed does not quantise weights under autocast: set deepspeed.quantized_weights=false or train.precision=fp32.")
    return problems


def _sequence(config: Config, world_size: int) -> list[str]:
    """What keeps sequences from being cut over ranks, the mixers left out."""
    problems, t, N = [], config.train, config.parallel.sequence
    if world_size % N:
        problems.append(f"parallel.sequence {N} does not divide the {world_size} rank(s) of this run; change it or start a multiple of {N}.")
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
        reason = mixer.why_whole(config.train.seq_len // N)
        if reason:
            problems.append(f"parallel.sequence {N}: mixer {name} cannot be split over ranks, as {reason}; set it to 1 or change the mixer.")
    return problems


def check(mapping: dict[str, Any], world_size: int = 1) -> Config:
    """The validated Config of a resolved mapping. Raises UserError with every problem found."""
    problems: list[str] = []
    config = parse(mapping, Config, "", problems)
    if not problems:
        problems += _positive(config) + _choices(config) + _combinations(config, world_size)
    problems += model_problems(config.model)
    if config.data.reader == "synthetic":
        problems += task_problems(config)
    if not problems and config.parallel.sequence > 1:
        problems += split_problems(config)
    if problems:
        raise UserError(problems)
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
