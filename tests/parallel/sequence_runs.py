"""Trains small models for four steps on the ranks of a launcher, several runs in one process: python -m tests.parallel.sequence_runs SHARDS OUT."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from data.loader import BatchLoader
from models import parallel
from models.lm import LanguageModel
from training.config.cli import checked, compose_config
from training.engine import Engine
from training.setup import model_config, open_reader, open_shards
from training.world import World, start_distributed

DENSE = "dense_lstm"
VARIANTS = {
    "plain": [],
    "bf16": ["train.precision=bf16"],
    "stream": ["data.reader=stream"],
    "recompute": ["train.activation_checkpointing={swiglu:[0],mlp:[1],mixer:[1,3],layer:[2]}"],
    "compile": [],
}
# (model, ranks of a sequence, ZeRO stage, variant); the rest of the ranks is data parallel. The hybrid has a layer of ParaGRU, Mamba-2 and attention;
# test_sequence.py has every mixer.
RUNS = {
    1: [*(("hybrid", 1, 1, variant) for variant in ("plain", "bf16", "stream")), (DENSE, 1, 1, "plain"), ("m2rnn", 1, 1, "plain")],
    2: [
        *(("hybrid", 2, stage, variant) for stage, variant in ((1, "plain"), (0, "bf16"), (1, "stream"), (3, "recompute"), (1, "compile"))),
        (DENSE, 2, 1, "recompute"),
        ("m2rnn", 2, 1, "recompute"),
    ],
    4: [("hybrid", 4, 1, "plain"), ("hybrid", 2, 2, "recompute")],
}


def losses(world: World, shards: str, model: str, stage: int, *more: str, compiled: bool = False) -> list[float]:
    """Losses of four steps of the tiny `model`; compiled: traced as train.compile=true does, without the minutes of its C++ compiler."""
    overrides = [
        "experiment=smoke",
        "train.device=cpu",
        f"data.path={shards}",
        f"model={model}",
        "train.global_batch=2",
        "train.micro_batch=1",
    ]
    config = checked(compose_config([*overrides, f"deepspeed=zero{stage}", f"parallel.sequence={world.sequence}", *more]))
    sources = open_shards(config.data.path, "train")
    lm = LanguageModel(model_config(config, sources)[0])
    lm.init_weights(0)
    lm.set_activation_checkpointing(config.train.activation_checkpointing)
    engine = Engine(lm, config, world)
    if compiled:
        engine.deepspeed.compile(backend="aot_eager")
    loader = BatchLoader(
        open_reader(config, sources), global_batch=2, micro_batch=1, replica=world.replica, replicas=world.replicas, slice_of=world.slice_of
    )
    with loader:
        per_step = [engine.step(loader.step(step), 1e-2).loss for step in range(4)]
    engine.destroy()
    return per_step


def main(shards: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks, results = int(os.environ["WORLD_SIZE"]), {}
    for model, N, stage, variant in RUNS[ranks]:
        world = start_distributed("cpu", sequence=N)
        where = "one" if ranks == 1 else f"{N}x{ranks // N} zero{stage}"
        results[f"{model} {variant} {where}"] = losses(world, shards, model, stage, *VARIANTS[variant], compiled=variant == "compile")
    if ranks == 2:  # bytes that cross a layer's borders do not grow with the sequence
        world, counted = start_distributed("cpu", sequence=2), []
        for T in (32, 64):
            parallel.traffic.clear()
            losses(world, shards, "mamba2", 1, f"train.seq_len={T}")
            counted.append(parallel.traffic.received.total())
        assert counted[0] == counted[1] > 0, counted
    if world.main:
        Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:3])
