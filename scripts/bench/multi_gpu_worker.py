"""What each rank of scripts/bench/multi_gpu.py runs: the cases that are put into a folder, one after another in one process group.

    torchrun --nproc_per_node N -m scripts.bench.multi_gpu_worker FOLDER

FOLDER/case-00000.json, case-00001.json, ... appear there one by one; a case is {"id", "kind": "train" or "layer", ...} and its row goes into
row-00000.json and so on. Every rank looks for the next case by itself, so that nothing waits on a GPU meanwhile. The file `end` ends the
worker, and so does the first case that fails, because ranks that wait for each other cannot go on, and a bench that no longer touches `alive`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.files import write_json
from data.loader import BatchLoader, Reader, Rows
from models import mixers, parallel
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.bench.spans import device_spans, exposed
from scripts.bench.timing import seconds, wait
from training.config.arguments import program
from training.config.cli import checked, compose_config
from training.cost.flops import device_name, peak_flops, training_flops_per_token
from training.engine import Engine
from training.errors import UserError
from training.result import local_tokens
from training.watch.metrics import peak_memory_gib
from training.world import World, start_distributed

ROOT = Path(__file__).resolve().parents[2]

VOCABULARY = 50432
SILENCE = 60.0  # seconds after which a bench that does not touch `alive` is taken for dead


class RandomTokens(Reader):
    """Sample k is a pure function of k: tokens of a skewed distribution, so that there is something to learn; one document a row."""

    def __init__(self, seq_len: int, vocabulary: int) -> None:
        self.seq_len, self.vocabulary = seq_len, vocabulary

    def samples(self, k_R: np.ndarray) -> Rows:
        u = np.stack([np.random.default_rng(int(k)).random(self.seq_len + 1) for k in k_R])
        return (self.vocabulary * u**4).astype(np.int64), np.zeros(u.shape, dtype=np.int32)


def fresh(device: torch.device) -> None:
    """Frees memory and resets the counters, so that this case measures nothing of the one before."""
    gc.collect()
    parallel.traffic.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def over_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def quick_weights(model: nn.Module) -> None:
    """Weights for timing, drawn on the device: a minute less for a billion parameters than `init_weights`."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.ndim > 1 and p.shape[0] > 2 else p.fill_(1.0)


class Ends:
    """When steps end: on a GPU by its own clock, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.marks = device.type == "cuda", list[Any]()

    def mark(self) -> None:
        if self.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next; on a GPU to be asked for after a wait."""
        return [a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in zip(self.marks, self.marks[1:])]


def train_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Steps of a whole model through the training engine, as train.py takes them."""
    config = checked(compose_config([*case["overrides"], f"parallel.sequence={world.sequence}"]))
    torch.manual_seed(0)
    with torch.device(world.device):
        model = LanguageModel(ModelConfig.from_dict({**config.model, "vocab_size": case.get("vocabulary", VOCABULARY)}))
    if case.get("init") == "own":
        model.init_weights(0)
    else:
        quick_weights(model)
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    flops = training_flops_per_token(model, config.train.seq_len)
    parameters = sum(p.numel() for p in model.parameters())
    engine = Engine(model, config, world)
    reader = RandomTokens(config.train.seq_len, case.get("vocabulary", VOCABULARY))
    t, losses, samples, communication, news = config.train, [], [], [], []
    counted, tokens, start, first_step_seconds = case["steps"] // 3, 0.0, 0.0, 0.0
    ends = Ends(world.device)
    with BatchLoader(
        reader,
        global_batch=t.global_batch,
        micro_batch=t.micro_batch,
        replica=world.replica,
        replicas=world.replicas,
        slice_of=world.slice_of,
        pin=world.device.type == "cuda",
    ) as loader:
        for n, batches in zip(range(case["steps"]), loader):
            parallel.traffic.clear()
            tokens = tokens or world.sum([local_tokens(batches)])[0]  # of every step, as train.py knows them from the step before
            if n in (0, 1, counted):
                wait(world.device)
                first_step_seconds = time.perf_counter() - start if n == 1 else first_step_seconds
                dist.barrier()
                start = time.perf_counter()
            if n == counted:
                ends.mark()
            result = engine.step(batches, case.get("lr", 1e-4), tokens=tokens)
            losses.append(result.loss)
            communication.append(result.communication / result.seconds)
            samples.append([i for batch in batches for i in batch.sample_ids])
            news += engine.news()
            if n >= counted:
                ends.mark()
        wait(world.device)
        each = ends.seconds()  # one after another, as in training
        step_seconds = statistics.median(each)
        parts = profiled(engine, next(iter(loader)), tokens, world) if case.get("profile") else {}
    rate = t.global_batch * t.seq_len / step_seconds / world.size
    peak = peak_flops(device_name(world.device), t.precision)
    row = {
        "parameters": parameters,
        "zero_stage_run": engine.stage,
        "seq_len": t.seq_len,
        "micro_batch": t.micro_batch,
        "losses": losses,
        "first_step_seconds": first_step_seconds,
        "step_seconds": step_seconds,
        "longest_step_seconds": max(each),
        "communication_share": statistics.mean(over_ranks(statistics.median(communication[counted:]))),
        "tokens_per_second_per_gpu": rate,
        "mfu": rate * flops / peak if peak else None,
        "memory_gib": max(over_ranks(peak_memory_gib(world.device))),
        **reserved(world.device),
        "news": news,
        "samples": sorted(set(sum(sum(over_ranks(samples), []), []))),
        **({"parts": parts} if parts else {}),
        **traffic_row(),
    }
    engine.destroy()
    return row


def reserved(device: torch.device) -> dict[str, Any]:
    """What torch's allocator took from the device at most, and how often it had to give back all it had cached: both are large where blocks are not
    recycled."""
    if device.type != "cuda":
        return {}
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return {"reserved_gib": max(over_ranks(torch.cuda.max_memory_reserved(device) / 2**30)), "alloc_retries": max(over_ranks(retries))}


PROFILED = 3  # steps


def profiled(engine: Engine, batches: list[Any], tokens: float, world: World) -> dict[str, Any]:
    """Where the time of a step of rank 0 goes, from some that follow each other; the others take them too."""

    def steps() -> None:
        for _ in range(PROFILED):
            engine.step(batches, 1e-4, tokens=tokens)

    dist.barrier()
    if not world.main or world.device.type != "cuda":
        steps()
        return {}
    return exposed(device_spans(steps), PROFILED)


def traffic_row() -> dict[str, Any]:
    t = parallel.traffic
    largest: dict[str, int] = {}
    for received in over_ranks(dict(t.received)):
        largest = {key: max(largest.get(key, 0), received.get(key, 0)) for key in {**largest, **received}}
    return {"received_bytes": largest, "solves": t.solves, "corrections": t.corrections}


def parts_of(mapping: dict[str, Any], D: int, x_BTD: Tensor, weight_BTD: Tensor, segments: Tensor, low: bool) -> list[Tensor]:
    """[output, gradient of x, gradients of all parameters] of one layer; inside `split` those of a slice."""
    mixer = layer_of(mapping, D, x_BTD.device)
    x = x_BTD.clone().requires_grad_()
    with parallel.split(mixer) if mapping.get("split") else torch.enable_grad():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            y = mixer(x, None, segments)[0]
        (y.float() * weight_BTD).sum().backward()
    assert x.grad is not None
    return [y.detach().float(), x.grad.float(), *(p.grad.float() for p in mixer.parameters() if p.grad is not None)]


def layer_of(mapping: dict[str, Any], D: int, device: torch.device) -> Any:
    torch.manual_seed(0)
    mixer = mixers.build({k: v for k, v in mapping.items() if k != "split"}, D, 0)
    mixer.init_weights(0.02, 0)
    return mixer.to(device)


def difference(case: dict[str, Any], world: World, T: int, low: bool) -> float:
    """Largest relative difference between slices over the ranks and the whole on this one: outputs and all gradients, packed documents."""
    D, device = case["D"], world.device
    g = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(1, T, D, generator=g).to(device) for _ in range(2))
    segments = (torch.arange(T)[None] > T * 2 // 3).int().to(device)
    rank_slice = slice(world.rank * T // world.size, (world.rank + 1) * T // world.size)
    whole = parts_of(case["mixer"], D, x, weight, segments, low)
    part = parts_of({**case["mixer"], "split": True}, D, x[:, rank_slice], weight[:, rank_slice], segments[:, rank_slice].contiguous(), low)
    for gradient in part[2:]:
        dist.all_reduce(gradient)
    exact = [whole[0][:, rank_slice], whole[1][:, rank_slice], *whole[2:]]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(part, exact))


def layer_case(case: dict[str, Any], world: World) -> dict[str, Any]:
    """Forward and backward of one mixer whose time is cut over all ranks: correct first, then time, memory and bytes."""
    D, T = case["D"], case["T"]
    row: dict[str, Any] = {}
    if case.get("check"):
        worst = [max(over_ranks(difference(case, world, case["check"], low))) for low in (False, True)]
        row["difference_fp32"], row["difference_bf16"] = worst
        row["correct"] = worst[0] < 1e-3 and worst[1] < 5e-2
    row |= timed(case, D, T // world.size, world, True)
    if case.get("alone"):
        alone = None
        if world.main:
            try:
                alone = timed(case, D, T, world, False)
            except torch.OutOfMemoryError:
                alone = {"error": "out of memory"}
        dist.barrier()
        row["one_gpu"] = alone
        if alone and "seconds" in alone:
            row["speedup"] = alone["seconds"] / row["seconds"]
    return row


def timed(case: dict[str, Any], D: int, T: int, world: World, over: bool) -> dict[str, Any]:
    """Seconds of a forward and backward pass in bf16; over: as one slice of all ranks, else T on this rank alone."""
    device = world.device
    fresh(device)
    mixer = layer_of(case["mixer"], D, device)
    x = torch.randn(1, T, D, device=device, dtype=torch.bfloat16).requires_grad_()
    segments = torch.zeros(1, T, device=device, dtype=torch.int32)

    def both() -> None:
        with parallel.split(mixer) if over else torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16):
                y = mixer(x, None, segments)[0]
            y.backward(x.detach().to(y.dtype))

    times: list[float] = []
    repeats = 2
    while len(times) < repeats:
        parallel.traffic.clear()
        times.append(seconds(both, device, dist.barrier if over else None))
        x.grad = None
        if len(times) == 2:  # rank 0 decides the number of repeats for all ranks
            enough = 2 + min(4, int(2 / max(times[1], 1e-3)))
            repeats = over_ranks(enough)[0] if over else enough
    row = {"seconds": statistics.median(times[1:]), "first_seconds": times[0], "memory_gib": peak_memory_gib(device)}
    return {**row, "memory_gib": max(over_ranks(row["memory_gib"])), **traffic_row()} if over else row


def next_case(folder: Path, number: int) -> dict[str, Any] | None:
    """Waits for the case; None when there is to be no more."""
    path = folder / f"case-{number:05d}.json"
    while not path.exists():
        try:
            if (folder / "end").exists() or time.time() - (folder / "alive").stat().st_mtime > SILENCE:
                return None
        except FileNotFoundError:
            return None
        time.sleep(0.02)
    return dict(json.loads(path.read_text()))


def main(words: list[str]) -> None:
    if len(words) != 1 or not Path(words[0]).is_dir():
        raise UserError("Give the folder of cases; scripts/bench/multi_gpu.py starts this program itself.")
    folder = words[0]
    world = start_distributed("auto", 5.0)
    cut = dataclasses.replace(world, sequence=world.size, group=dist.new_group(list(range(world.size))))
    number = 0
    while (case := next_case(Path(folder), number)) is not None:
        start, gib_before = time.perf_counter(), torch.cuda.memory_allocated() / 2**30 if world.device.type == "cuda" else 0.0
        row = (layer_case if case["kind"] == "layer" else train_case)(case, cut if case.get("sequence", 1) > 1 else world)
        row |= {"held_before_gib": gib_before, "case_seconds": time.perf_counter() - start}
        fresh(world.device)  # at once: the next case may go to another worker on the same GPU
        if world.main:
            write_json(Path(folder) / f"row-{number:05d}.json", {**case, "gpus": world.size, "device": device_name(world.device), **row})
        number += 1
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(program(__doc__, main))
