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
from training.cli import checked, compose_config
from training.engine import Engine, World, start_distributed
from training.setup import model_config, open_reader, open_shards

MODELS = ("hybrid", "mamba2", "paralstm", "transformer")
RUNS = {
    1: [(model, 1, 1) for model in MODELS],
    2: [*((model, 2, 1) for model in MODELS), ("hybrid", 2, 3)],
    4: [*((model, 4, 1) for model in MODELS), ("hybrid", 2, 1)],
}


def losses(world: World, shards: str, model: str, stage: int, *more: str) -> list[float]:
    """Losses of four steps of the tiny `model`."""
    overrides = ["experiment=smoke", "train.device=cpu", f"data.path={shards}", f"model={model}", "train.micro_batch=1"]
    config = checked(compose_config([*overrides, f"deepspeed=zero{stage}", f"parallel.sequence={world.sequence}", *more]))
    sources = open_shards(config.data.path, "train")
    lm = LanguageModel(model_config(config, sources)[0])
    lm.init_weights(0)
    engine = Engine(lm, config, world)
    loader = BatchLoader(open_reader(config, sources), 4, 1, world.replica, world.replicas, slice_of=world.slice_of)
    with loader:
        found = [engine.step(loader.step(step), 1e-2).loss for step in range(4)]
    engine.deepspeed.destroy()
    return found


def main(shards: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks, found = int(os.environ["WORLD_SIZE"]), {}
    for model, N, stage in RUNS[ranks]:
        world = start_distributed("cpu", sequence=N)
        where = str(N) if N == ranks else f"{N}x{ranks // N}"
        found[model if ranks == 1 else f"{model} {where} zero{stage}"] = losses(world, shards, model, stage)
    if ranks == 2:  # bytes that cross a layer's borders do not grow with the sequence
        world, counted = start_distributed("cpu", sequence=2), []
        for T in (32, 64):
            parallel.traffic["bytes"] = 0
            losses(world, shards, "mamba2", 1, f"train.seq_len={T}")
            counted.append(parallel.traffic["bytes"])
        assert counted[0] == counted[1] > 0, counted
    if world.main:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])
