"""Whether a run fits into the memory of its device, before anything of it is built: the estimate of training/cost/memory.py beside what there is.

A run that is far below by a bound on its activations is not measured, which would cost every small run a second or two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from models.config import ModelConfig
from training.config.schema import Config
from training.cost.device import device_memory, main_memory
from training.errors import UserError
from training.launch import ranks_here
from training.world import World
from training.zero.policy import stage_of

GIB = 2**30
SURE, SURE_OF_ZERO3 = 1.02, 1.1  # times the device that an estimate has to be before it is sure that the run cannot fit, see docs/memory.md
NOTICE = 0.25  # share of the device below which a run is not measured


def bound(config: Config, settings: ModelConfig, parameters: int) -> float:
    """More bytes than a rank can need: everything whole on it, each layer keeping far more than any mixer does, attention with all its scores."""
    t = config.train
    T = t.seq_len // config.parallel.sequence
    tokens = t.micro_batch * T
    layers = settings.n_layers * tokens * (200 * settings.d_model + 8 * settings.mlp_width)
    scores = 64 * tokens * T * 8 if any(mixer.get("type") == "attention" for mixer in settings.mixers.values()) else 0
    logits = 4 * min(tokens, settings.head_chunk if settings.recompute_head else tokens) * settings.vocab_size
    return 40.0 * parameters + 4.0 * (layers + logits) + 4.0 * scores + 6.0 * config.deepspeed.bucket_bytes


def misfit(config: Config, shards: Any, world: World, room: float | None = None) -> str:
    """'' where the run fits its device (or train.check_memory=false), else a sentence that says what to change. room: bytes in the place of the
    device's."""
    from training.setup import model_config

    if not config.train.check_memory or shards is None:
        return ""
    try:
        settings = model_config(config, shards)[0]
    except UserError as error:  # of this rank's data, perhaps
        return str(error)
    on_cpu = world.device.type == "cpu"
    local = ranks_here() if world.size > 1 else 1  # ranks of a machine share its memory
    have = (device_memory(world.device) if room is None else room) / (local if on_cpu else 1)
    from training.cost.flops import meta_model

    model = meta_model(settings)
    if bound(config, settings, sum(p.numel() for p in model.parameters())) < NOTICE * have:
        return ""
    need, phase = _needs(config, settings, model, world.size, on_cpu, have)
    if need <= have * (SURE_OF_ZERO3 if stage_of(config, world.size) == 3 else SURE):
        return _host(config, model, world.size, local) if not on_cpu else ""
    whose = (
        f"a rank's share of this machine's memory ({local} on it)"
        if on_cpu and local > 1
        else "this machine"
        if on_cpu
        else f"{world.device}"
    )
    return (
        f"The run needs about {need / GIB:.1f} GiB on each rank, most of it in {phase}, and {whose} has {have / GIB:.1f}; {_advice(config, settings, model, world, have)}, "
        "or try it all the same with train.check_memory=false."
    )


def recomputation_of(config: Config, settings: ModelConfig, world: World) -> tuple[Any, str]:
    """(what model.set_activation_checkpointing is given, a sentence about it or ''): the setting, or what auto settles, the same on all ranks, who
    call this together."""
    if config.train.activation_checkpointing != "auto":
        return config.train.activation_checkpointing, ""
    from training.cost import recomputation
    from training.cost.flops import meta_model

    local = ranks_here() if world.size > 1 and world.device.type == "cpu" else 1
    room = min(row[0] for row in world.gather([recomputation.budget(config, world.device) / local]))
    model = meta_model(settings)
    if bound(config, settings, sum(p.numel() for p in model.parameters())) < NOTICE * room:
        return "none", ""
    chosen = recomputation.choose(config, settings, model, world.size, room)
    return chosen.parts, recomputation.told(chosen, room) + "."


def _needs(config: Config, settings: ModelConfig, model: Any, ranks: int, on_cpu: bool, have: float) -> tuple[float, str]:
    """(bytes of a rank at most, in which phase); on a CPU with what is moved to main memory, which is the device then. have: bytes of the device,
    into which auto fits the run if it can."""
    from training.cost import memory, recomputation

    if config.train.activation_checkpointing == "auto":
        need = recomputation.choose(config, settings, model, ranks, recomputation.ROOM * have).estimate
    else:
        need = memory.estimate(config, model, memory.activations(config, settings), ranks)
    return need.peak + (need.held.host if on_cpu else 0.0), need.phase


def _host(config: Config, model: Any, ranks: int, local: int) -> str:
    """A sentence where what is moved from GPUs to main memory does not fit there."""
    from training.cost import memory

    need, have = memory.held(config, model, ranks).host * local, main_memory()
    if need <= have:
        return ""
    return (
        f"Offload needs {need / GIB:.1f} GiB of main memory on this machine, which has {have / GIB:.1f}; set deepspeed.offload_optimizer=none and "
        "deepspeed.offload_parameters=none, use more machines, or try it all the same with train.check_memory=false."
    )


def _advice(config: Config, settings: ModelConfig, model: Any, world: World, have: float) -> str:
    """The first change that makes it fit, of those that keep the numbers of the run, in the order of what they cost."""
    t, ds = config.train, config.deepspeed
    auto = replace(t, activation_checkpointing="auto")
    tries: list[tuple[str, Config]] = []
    small = [t.micro_batch >> i for i in range(1, t.micro_batch.bit_length()) if t.micro_batch % (1 << i) == 0]
    small += [1] if t.micro_batch > 1 and 1 not in small else []
    for micro in small:
        tries.append((f"train.micro_batch={micro}", replace(config, train=replace(t, micro_batch=micro))))
    if t.activation_checkpointing not in ("full", "auto"):
        tries.append(("train.activation_checkpointing=auto", replace(config, train=auto)))
        if small:
            words = f"train.micro_batch={small[-1]} train.activation_checkpointing=auto"
            tries.append((words, replace(config, train=replace(auto, micro_batch=small[-1]))))
    last = tries[-1] if tries else ("", config)
    muon = config.optim.kind == "muon"  # which runs under no ZeRO stage
    for stage in (2, 3):
        if world.size > 1 and stage > ds.stage and not muon:
            tries.append((f"deepspeed=zero{stage} {last[0]}".strip(), replace(last[1], deepspeed=replace(ds, stage=stage))))
    if world.device.type != "cpu" and ds.offload_parameters == "none" and not muon:
        section = replace(ds, stage=3, offload_optimizer="cpu", offload_parameters="cpu")
        tries.append((f"deepspeed=zero3_offload {last[0]}".strip(), replace(last[1], deepspeed=section)))
    for words, plan in tries:
        need = _needs(plan, settings, model, world.size, world.device.type == "cpu", have)[0]
        if need <= have:
            return f"{words} needs {need / GIB:.1f}"
    zero3 = "optim=adamw and deepspeed=zero3" if muon else "deepspeed=zero3"
    more = f"more ranks with {zero3}, or a device with more memory" if world.device.type != "cpu" else "a machine with more memory"
    return f"no smaller micro-batch, recomputation or ZeRO stage makes it fit: take a smaller size, a shorter train.seq_len, {more}"
