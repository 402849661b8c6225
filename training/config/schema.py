"""The schema of a run: which keys exist and of what types they are. The YAML files under configs/ hold the values.

`parse` reads a mapping and makes a sentence of each key or type that is wrong; training/config/checks.py says what may be combined.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any

from data.fields import close_to, nearest, read
from training.config import ranges, suggest
from training.config.ranges import AMOUNT, COUNT, MINUTES, POSITIVE, SHARE, Range
from training.schedule import lr_factor

STARTS = ("zero", "pass", "random", "fitted")  # of training.initial_state, which needs torch
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "muon")
UPDATE_SCALES = ("adamw", "spectral")  # of training.optim.muon


@dataclass
class TrainSection:
    seq_len: Annotated[int, Range(1, 2**31 - 2)] = 256
    global_batch: Annotated[int, Range(1, 10**7)] = 32
    micro_batch: Annotated[int, Range(1, 10**7)] = 8
    steps: Annotated[int | None, COUNT] = 300
    tokens: Annotated[float | None, Range(1, 10**18)] = None
    precision: str = "fp32"
    residual: str = "fp32"
    grad_clip: Annotated[float, Range(0, hint="0 switches clipping off")] = 1.0
    fp8: bool = False
    compile: bool = False
    cuda_graph: str = "auto"
    packed_attention: str = "auto"
    activation_checkpointing: Any = "none"  # of models/remade.py, or auto
    memory_budget: Annotated[float | None, POSITIVE] = None
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
class DistillSection:
    teacher: str | None = None
    kl: Annotated[float, Range(0)] = 1.0
    next_token: Annotated[float, Range(0)] = 0.0
    steps: Annotated[float, Range(0)] = 0.5
    temperature: Annotated[float, POSITIVE] = 1.0


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
    prompt_mask: Annotated[float, SHARE] = 0.15


@dataclass
class OptimSection:
    """lr: None for the one that goes with the size and the model, see `training.config.recipe`. From muon_lr on: of kind muon alone."""

    kind: str = "adamw"
    wrapper: dict[str, Any] = field(default_factory=lambda: {"type": "none"})  # of training/wrappers
    lr: Annotated[float | None, POSITIVE] = None
    weight_decay: Annotated[float, Range(0)] = 0.1
    betas: list[Annotated[float, SHARE]] = field(default_factory=lambda: [0.9, 0.95])
    eps: Annotated[float, POSITIVE] = 1e-8
    muon_lr: Annotated[float | None, POSITIVE] = None
    momentum: Annotated[float, SHARE] = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, Range(1, 30)] = 4
    update_scale: str = "adamw"


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
    reduction: str = "auto"
    gather: str = "block"
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
    distill: DistillSection = field(default_factory=DistillSection)
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
    def prompt(self) -> int:
        """Tokens of the prompts that the model's mixers read twice; 0 where none does."""
        mixers = (self.model.get("mixers") or {}).get
        used = (mixers(str(name)) for name in self.model.get("pattern") or ())
        return max((int(m.get("prompt") or 0) for m in used if isinstance(m, dict) and str(m.get("prompt") or 0).isdigit()), default=0)

    @property
    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.train.seq_len

    def share_at(self, step: int) -> float:
        """How much of the run lies behind it after `step` steps, from 0 to 1."""
        return (step - self.at.first_step) / max(1, self.total_steps - self.at.first_step)

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
