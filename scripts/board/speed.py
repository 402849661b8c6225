"""Speed and memory of a row on an otherwise idle device: training tokens/s and MFU, decoding tokens/s and state bytes.

A cell of this kind runs alone. Training is the very step of the other cells, timed in bursts; decoding is one sequence, greedy, in bf16, its step a
CUDA graph (models/decode.py), after 1,024 and 131,072 tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from models.config import ModelConfig
from models.decode import cast
from models.lm import LanguageModel
from scripts.bench.decode import measure, state_at
from scripts.bench.timing import copy_bandwidth
from scripts.board.learner import Learner
from training.cost.flops import device_name, peak_flops, training_flops_per_token

BURSTS = 3


def training_speed(settings: dict[str, Any], data: str, device: torch.device) -> dict[str, Any]:
    """Median tokens/s of BURSTS bursts of settings['burst'] steps, MFU of the device's dense peak, and the most memory used."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    learner, seconds = Learner(settings, data, device), []
    for burst in range(BURSTS + 1):
        start = time.perf_counter()
        for _ in learner.advance(learner.done + settings["burst"]):
            pass
        loss = learner.mean_loss(settings["burst"])  # waits for the device
        if burst:  # in the first one kernels are compiled and the step is captured
            seconds.append(time.perf_counter() - start)
    where = kernels_of(learner)
    rate = settings["burst"] * learner.B * learner.T / statistics.median(seconds)
    flops = training_flops_per_token(learner.model, learner.T)
    peak = peak_flops(device_name(device), settings["precision"]) if device.type == "cuda" else None
    return {
        "tokens_per_s": rate,
        "tokens_per_s_of_bursts": [settings["burst"] * learner.B * learner.T / s for s in seconds],
        "training_flops_per_token": flops,
        "mfu": flops * rate / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "graphed": not learner.step.why_not,
        "loss_is_finite": loss == loss,
        **where,
    }


def kernels_of(learner: Learner, steps: int = 4, most: int = 12) -> dict[str, Any]:
    """On a GPU the share of a few steps in which a kernel runs (busy), and the kernels that take longest, in ms a step: what a cell waits for."""
    if learner.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(learner.device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in learner.advance(learner.done + steps):
            pass
        torch.cuda.synchronize(learner.device)
        wall = time.perf_counter() - start
    each = sorted(((k.device_time_total / 1e3 / steps, k.key, k.count // steps) for k in profiler.key_averages()), reverse=True)
    longest = [{"ms": round(ms, 3), "launches": count, "kernel": name[:80]} for ms, name, count in each[:most]]
    return {"busy": round(sum(ms for ms, _, _ in each) * steps / 1e3 / wall, 3), "launches": sum(n for _, _, n in each), "kernels": longest}


def decoding_speed(settings: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """What scripts/bench/decode.py finds for one sequence at each of settings['contexts'], after a state of that many random tokens."""
    model = LanguageModel(ModelConfig.from_dict(settings["model"]))
    model.init_weights(settings["seed"])
    model = cast(model.to(device), torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    copy, rows, state, read = 1e3 * copy_bandwidth(device), [], None, 0
    for context in settings["contexts"]:
        state = state_at(model, context, state, read)
        read = context
        found = measure(model, state, 1, context, False, copy)
        chosen = ("tokens_per_s", "state_bytes_per_sequence", "fused_kernels", "logits_error_relative")
        rows.append({"context": context, **{key: found[key] for key in chosen}})
    return rows


def both(settings: dict[str, Any], data: str, device: torch.device) -> dict[str, Any]:
    """The result of a cell of this kind."""
    result = training_speed(settings, data, device)
    try:
        result["decode"] = decoding_speed(settings, device)
    except (ValueError, RuntimeError) as error:
        result["decode_failed"] = str(error).splitlines()[0]
    return result
