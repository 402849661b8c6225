"""Checks of a run's settings against each other: choices, combinations, lengths within the run, where its data lie. `check` makes all of them and
turns every mistake into one sentence, all reported together."""

from __future__ import annotations

import math
import os
import shlex
from typing import Any

from data.errors import UserError
from models.param import rates_of_its_own
from training import wrappers
from training.config import ranges, recipe
from training.config.schema import OPTIMIZERS, PRECISIONS, STARTS, UPDATE_SCALES, Config, DistillSection, parse
from training.schedule import KINDS

NO_DATA = "data.path is not given; write data.path=FOLDER with a folder that python -m data.prepare has made."


def lengths(config: Config) -> list[str]:
    """Stretches that are longer than the run they lie in. Raises nothing where the run's own length is unclear."""
    t, s = config.train, config.schedule
    if (t.steps is None) == (t.tokens is None):
        return []
    total, warmup, decay = config.total_steps, config.in_steps(s.warmup), config.in_steps(s.decay)
    run = f"the {total:,} step{'s' if total > 1 else ''} of the run"
    below = f" (a number below 1 is a fraction of the run, else it counts {s.unit})"
    if warmup > total:
        return [
            f"schedule.warmup {s.warmup:,g} is {warmup:,} steps, longer than {run}: its rate would never be reached; shorten it{below}."
        ]
    if s.kind == "wsd" and decay > total:
        return [f"schedule.decay {s.decay:,g} is {decay:,} steps, longer than {run}; shorten it{below}."]
    if s.kind == "wsd" and warmup + decay > total:
        return [f"schedule.warmup and schedule.decay take {warmup:,} + {decay:,} steps, more than {run}; shorten one{below}."]
    if config.profile and config.profile_start > total and not config.dry_run:
        return [f"profile=true would trace from step {config.profile_start:,} on, after {run}; lower profile_start."]
    return []


def notes(config: Config) -> list[str]:
    """What is allowed but will not happen in a run of this length, a sentence each."""
    total = config.total_steps - config.at.first_step
    rows = {"checkpoint.every": config.checkpoint.every, "eval.every": config.eval.every, "eval.sample_every": config.eval.sample_every}
    sentences = [
        f"{key}={value:,} is longer than the run of {total:,} steps: only at the end" for key, value in rows.items() if value > total
    ]
    schedule = config.schedule
    if schedule.warmup and not config.in_steps(schedule.warmup):
        sentences.append(f"schedule.warmup={schedule.warmup:,g} is less than a step of the run: there is no warm-up")
    if schedule.kind == "wsd" and schedule.decay and config.in_steps(schedule.decay) < 2:
        sentences.append(f"schedule.decay={schedule.decay:,g} is less than two steps of the run: the rate stays at its peak to the end")
    if config.profile and config.profile_start + config.profile_steps - 1 > total:
        sentences.append(
            f"profile_steps={config.profile_steps:,} reaches beyond the run of {total:,} steps: only those up to its end are traced"
        )
    mixers = config.model.get("mixers") or {}
    for name in dict.fromkeys(config.model.get("pattern") or ()):
        window = mixers[name].get("window") if isinstance(mixers.get(name), dict) else None
        if isinstance(window, int) and window > config.train.seq_len:
            sentences.append(
                f"model.mixers.{name}.window={window:,} is longer than train.seq_len={config.train.seq_len:,}: it cuts nothing in training"
            )
    if config.distill.teacher is None and config.distill != DistillSection():
        sentences.append("distill has settings but no distill.teacher: nothing is distilled")
    late = [step for step in config.checkpoint.milestones if step > config.total_steps]
    if late:
        sentences.append(f"checkpoint.milestones holds {late[0]:,}, after the last step {config.total_steps:,}")
    samples = (config.total_steps - config.at.step) * config.train.global_batch
    if config.data.reader == "synthetic" and config.data.curriculum >= samples > 0:
        sentences.append(
            f"data.curriculum={config.data.curriculum:,} is longer than the run of {samples:,} sequences: none has the full length"
        )
    return sentences


def at_home(config: Config) -> None:
    """Replaces a leading ~ of paths, which shells leave alone inside a word."""
    home = os.path.expanduser
    config.run_dir, config.train.resume = home(config.run_dir), home(config.train.resume)
    config.train.start_from = config.train.start_from and home(config.train.start_from)
    config.distill.teacher = config.distill.teacher and home(config.distill.teacher)
    config.deepspeed.nvme_path = config.deepspeed.nvme_path and home(config.deepspeed.nvme_path)
    if isinstance(config.data.path, dict):
        config.data.path = {home(str(folder)): weight for folder, weight in config.data.path.items()}
    elif isinstance(config.data.path, (str, int, float)):
        config.data.path = home(str(config.data.path))


def _mixture(folders: list[str]) -> str:
    """What to write in the place of a list of folders."""
    if len(folders) < 2:
        return f"data.path takes a folder, not a list; write {shlex.quote('data.path=' + ''.join(folders))}."
    shares = ", ".join(f"{folder}: {1 / len(folders):.2g}" for folder in folders)
    return f"data.path takes one folder, or several with their weights; write {shlex.quote(f'data.path={{{shares}}}')}."


def data(config: Config) -> list[str]:
    """What is wrong with the form of data.path, whatever lies there."""
    if isinstance(config.data.path, (list, tuple)):
        return [_mixture(list(map(str, config.data.path)))]
    if isinstance(config.data.path, dict) and config.data.path:
        wrong = {folder: weight for folder, weight in config.data.path.items() if not _weight(weight)}
        sentences = [
            f"data.path: the weight of {folder} must be a number of zero or more, not {weight!r}." for folder, weight in wrong.items()
        ]
        nothing = not wrong and not any(config.data.path.values())
        return sentences + (["data.path gives every folder the weight 0; give one of them more."] if nothing else [])
    return [] if config.data.path or config.dry_run else [NO_DATA]


def _weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _choices(config: Config) -> list[str]:
    rows: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("train.precision", config.train.precision, PRECISIONS),
        ("train.residual", config.train.residual, PRECISIONS),
        ("train.cuda_graph", config.train.cuda_graph, ("auto", "all", "off")),
        ("train.packed_attention", config.train.packed_attention, ("auto", "own", "torch")),
        ("data.reader", config.data.reader, ("windows", "stream", "synthetic")),
        ("train.initial_state", config.train.initial_state, STARTS),
        ("optim.kind", config.optim.kind, OPTIMIZERS),
        ("optim.update_scale", config.optim.update_scale, UPDATE_SCALES),
        ("schedule.kind", config.schedule.kind, KINDS),
        ("schedule.unit", config.schedule.unit, ("steps", "tokens")),
        ("deepspeed.offload_optimizer", config.deepspeed.offload_optimizer, ("none", "cpu", "nvme")),
        ("deepspeed.offload_parameters", config.deepspeed.offload_parameters, ("none", "cpu", "nvme")),
        ("deepspeed.reduction", config.deepspeed.reduction, ("auto", "fp32", "bf16")),
        ("deepspeed.gather", config.deepspeed.gather, ("block", "step")),
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
        if config.distill.teacher is not None:
            problems.append(
                "parallel.sequence above 1 gives each rank a part of a sequence, and distill.teacher reads whole ones; set it to 1."
            )
    distill = config.distill
    if distill.teacher is not None and distill.steps and not distill.kl and not distill.next_token:
        problems.append("distill.kl and distill.next_token are both zero: nothing would be learnt for distill.steps; set one above zero.")
    if t.fp8 and (t.precision != "bf16" or t.compile):
        problems.append("train.fp8=true takes products out of bf16 as they are run: it needs train.precision=bf16 and train.compile=false.")
    if t.residual == "bf16" and t.precision != "bf16":
        problems.append(
            "train.residual=bf16 adds up in 16 bits what layers in 16 bits have made: set train.precision=bf16, or train.residual=fp32."
        )
    if ds.offload_parameters != "none" and ds.stage != 3:
        problems.append(f"deepspeed.offload_parameters needs deepspeed.stage=3, not {ds.stage}.")
    if ds.offload_optimizer != "none" and ds.stage == 0:
        problems.append("deepspeed.offload_optimizer needs deepspeed.stage of 1, 2 or 3.")
    problems += wrappers.KINDS.parse(config.optim.wrapper, config)[1]
    problems += _prompt(config) + _zero(config, world_size) + (_muon(config) if config.optim.kind == "muon" else [])
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
    if {".", ".."} & set(config.name.split("/")):
        problems.append(f"name={config.name} leads out of the folder of runs; give a plain name, and run_dir=FOLDER for another place.")
    empty = {"name": config.name, "run_dir": config.run_dir, "train.resume": t.resume, "train.start_from": t.start_from}
    problems += [
        f"{key} is empty; give it a value, or leave it out." for key, value in empty.items() if value is not None and not value.strip()
    ]
    return problems


def _prompt(config: Config) -> list[str]:
    """What prompts that are read twice cannot be combined with."""
    problems, t, prompt = [], config.train, config.prompt
    if not prompt:
        return []
    if prompt >= t.seq_len:
        problems.append(
            f"A prompt of {prompt} tokens leaves nothing of train.seq_len {t.seq_len} to predict; shorten it (model.mixers.NAME.prompt)."
        )
    if config.data.reader != "windows":
        problems.append(f"Prompts that are read twice need data.reader=windows, not {config.data.reader}.")
    if t.initial_state != "zero":
        problems.append(f"Prompts that are read twice need train.initial_state=zero, not {t.initial_state}.")
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
    if ds.gather == "step":
        moves = ds.offload_optimizer != "none" or ds.offload_parameters != "none" or any(plus.values())
        starts = config.train.initial_state != "zero" or config.data.reader == "stream"
        if ds.stage != 3 or moves or starts or config.train.compile:
            problems.append(
                "deepspeed.gather=step is for deepspeed.stage=3 without offload, hpz and quantisation, with train.initial_state=zero, a reader other"
                " than stream, and train.compile=false; set it to block."
            )
    if ds.hpz > 1 and world_size % ds.hpz and not config.dry_run:
        problems.append(f"deepspeed.hpz {ds.hpz} does not divide the {world_size} rank(s) of this run; use the number of ranks of a node.")
    if ds.quantized_weights and config.train.precision != "fp32":
        problems.append(
            "DeepSpeed does not quantise weights under autocast: set deepspeed.quantized_weights=false or train.precision=fp32."
        )
    return problems


def _muon(config: Config) -> list[str]:
    """What Muon, which needs whole matrices and their whole gradients on every rank, cannot be combined with."""
    problems, o, ds = [], config.optim, config.deepspeed
    if ds.stage > 1:
        problems.append(
            f"optim=muon needs whole gradients and divides its own state over the ranks; set deepspeed.stage to 0 or 1, not {ds.stage}."
        )
    elif ds.offload_optimizer != "none":
        problems.append(f"optim=muon keeps its momentum on the device; set deepspeed.offload_optimizer=none, not {ds.offload_optimizer}.")
    if rates_of_its_own(config.model):
        problems.append("model.param gives parameters the rates that AdamW needs; take optim=adamw, or param=standard with optim=muon.")
    channel = config.model.get("channel")
    if isinstance(channel, dict) and channel.get("rate_power"):
        problems.append(
            "model.channel.rate_power sets rates of AdamW, and Muon has one for all matrices; take optim=adamw, or set it to 0."
        )
    if o.momentum == 1:
        problems.append("optim.momentum must be from 0 up to, but not, 1.")
    if o.update_scale == "spectral" and o.muon_lr is None:
        problems.append(
            "optim.update_scale=spectral makes updates of another size than AdamW's; give the matrices a rate of their own, optim.muon_lr=0.02 or so."
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


def depth_problems(config: Config) -> list[str]:
    """What layers that are used several times in a pass do not go with."""
    from models import depth

    mapping, start, problems = config.model.get("depth"), config.train.initial_state, []
    way = depth.KINDS.parse(mapping, config.model.get("n_layers") or 1)[0] if mapping else None
    if way is None:
        return []
    if config.deepspeed.stage == 3 and config.deepspeed.gather == "block":
        problems.append(
            "deepspeed.stage=3 lets go of a layer's weights after its first use in a pass, and model.depth uses it again; take stage 2, or"
            " deepspeed.gather=step."
        )
    if way.varies and start != "zero":
        problems.append(
            f"train.initial_state={start} needs one state for each visit of a layer, and model.depth draws their number; set it to zero."
        )
    return problems


def check(mapping: dict[str, Any], world_size: int = 1) -> Config:
    """The validated Config of a resolved mapping. Raises UserError with every problem found."""
    problems: list[str] = []
    config = parse(mapping, Config, "", problems)
    readable = not problems
    if readable:
        at_home(config)
    told = [text.split()[0] for text in problems]
    outside = [text for text in ranges.problems(config) if text.split()[0] not in told]
    problems += outside + ranges.loose(config.size, "size")
    if readable:
        problems += _choices(config) + _combinations(config, world_size) + ([] if outside else lengths(config))
    told_of_model = model_problems(config.model)
    problems += told_of_model or recompute_problems(config) + depth_problems(config)
    if config.data.reader == "synthetic":
        problems += task_problems(config)
    else:
        problems += data(config)
    if not problems and config.parallel.sequence > 1:
        problems += split_problems(config)
    if problems:
        raise UserError(list(dict.fromkeys(problems)))  # two checks may say the same
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
    except UserError as error:
        return error.problems
    least = task.min_length()
    return [f"eval.lengths holds {n}, which is too short for the task; it needs {least} or more." for n in config.eval.lengths if n < least]


def recompute_problems(config: Config) -> list[str]:
    """What is wrong with train.activation_checkpointing, for the layers of the model."""
    from models.config import ModelConfig
    from models.remade import parts_by_layer

    choice = config.train.activation_checkpointing
    if choice in ("none", "full", "auto"):
        return []
    try:
        model = config.model
        if "init_from" in model:
            from models.hub.importing import resolved

            model = resolved(model)
        parts = parts_by_layer(choice, ModelConfig.from_dict({**model, "vocab_size": model.get("vocab_size") or 256}))
        if config.parallel.sequence > 1 and any("states" in of_layer for of_layer in parts):
            return ["train.activation_checkpointing names 'states', which ranks that share a sequence (parallel.sequence) keep; use mixer."]
    except UserError as error:
        return error.problems
    return []


def model_problems(mapping: dict[str, Any]) -> list[str]:
    """Problems of the model section alone; the vocabulary may still be open (it comes from the shards)."""
    from models.config import ModelConfig

    try:
        if "init_from" in mapping:
            from models.hub.importing import resolved

            mapping = resolved(mapping)
        ModelConfig.from_dict({**mapping, "vocab_size": mapping.get("vocab_size") or 256})
    except UserError as error:
        return error.problems
    gone = [key for key in ("pattern", "mixers") if key not in mapping]
    return [f"model.{key} is missing; choose a model (model=hybrid), or give it." for key in gone]
