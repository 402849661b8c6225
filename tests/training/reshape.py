"""Work of several ranks in one process each, for test_checkpoint.py: python -m tests.training.reshape save|load|nan SHARDS FOLDER.

save: at every ZeRO stage two steps, a checkpoint, the whole state as DeepSpeed itself tells it, and the loss of the next step.
load: each of these checkpoints at ZeRO stages, compared with that state, and the loss of the next step.
nan: a gradient that is NaN on the last rank alone, at every ZeRO stage.
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from data.loader import BatchLoader
from models.lm import LanguageModel
from training import checkpoint
from training.config.cli import checked, compose_config
from training.config.schema import Config
from training.engine import Engine
from training.saving.saver import Saver
from training.setup import model_config, open_reader, open_shards
from training.world import World, start_distributed
from training.zero.local_state import MOMENTS

LR = 1e-2


@lru_cache
def settings(*words: str) -> Config:
    """Composed once, as many runs have the same ones."""
    small = ["experiment=smoke", "train.device=cpu", "size.d_model=48", "model.mixers.mamba2.head_dim=16", "train.micro_batch=1"]
    return checked(compose_config([*small, *words]))


class Run:
    """A tiny model at a ZeRO stage with its data, from the start or from a checkpoint."""

    def __init__(self, world: World, shards: str, stage: int, folder: Path | None = None, *more: str) -> None:
        self.config, self.world = settings(f"data.path={shards}", f"deepspeed=zero{stage}", *more), world
        sources = open_shards(self.config.data.path, "train")
        self.model = LanguageModel(model_config(self.config, sources)[0])
        self.model.init_weights(0 if folder is None else 1)
        first = 0
        if folder is not None:
            checkpoint.load_weights(folder, self.model)
            first = checkpoint.read_state(folder)["step"]
        self.engine = Engine(self.model, self.config, world)
        if folder is not None:
            checkpoint.restore_optimizer(folder, self.engine)
        reader = open_reader(self.config, sources)
        self.loader = BatchLoader(
            reader, global_batch=self.config.train.global_batch, micro_batch=1, replica=world.rank, replicas=world.size, start_step=first
        )

    def step(self, is_bad: Any = None) -> Any:
        return self.engine.step(next(self.loader), LR, is_bad)

    def whole(self) -> dict[str, torch.Tensor]:
        """Weights and moments by DeepSpeed's own gathering."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.engine.stage in (1, 2):
            self.engine.link_moments()
        parameters = {}
        for name, p in self.engine.parameters.items():
            with self.engine.gathered([name]):
                parameters[name] = p.detach().clone()
            for key in MOMENTS:
                state = self.engine.optimizer.state[p][key] if not self.engine.stage else safe_get_full_optimizer_state(p, key)
                parameters[f"{key}.{name}"] = state.detach().clone().reshape(parameters[name].shape)
        return parameters

    def close(self) -> None:
        self.loader.close()
        self.engine.destroy()


def save(world: World, shards: str, folder: Path) -> dict[str, Any]:
    result = {}
    for stage in range(4):
        run = Run(world, shards, stage)
        run.step(), run.step()
        out = folder / f"zero{stage}"
        documents = {"config.json": json.dumps(run.model.config.to_dict()), "tokenizer.json": "{}"}
        run.config.checkpoint.background = stage % 2 == 0
        with Saver(out, run.engine, run.config.checkpoint, documents, print) as saver:
            saver.save({"step": 2})
            whole = run.whole()
            saver.finish()
        if world.main:
            save_file(whole, folder / f"whole{stage}.safetensors")
        numels = [p.numel() for p in run.engine.parameters.values()] if stage == 0 else []
        result[f"zero{stage}"] = {"loss": run.step().loss, "uneven": sum(n % world.size > 0 for n in numels)}
        run.close()
    return result


def load(world: World, shards: str, folder: Path) -> dict[str, Any]:
    result = {}
    pairs = [(a, b) for a in range(4) for b in range(4)] if world.size > 1 else [(a, (a + 1) % 4) for a in range(4)]
    for source, stage in pairs:
        newest = checkpoint.newest_together(folder / f"zero{source}", world)
        assert newest is not None
        run, exact = Run(world, shards, stage, newest), load_file(folder / f"whole{source}.safetensors")
        differ = [name for name, value in run.whole().items() if not torch.equal(value, exact[name])]
        result[f"{source} {stage}"] = {"loss": run.step().loss, "differ": differ, "steps": run.engine.optimizer_steps()}
        run.close()
    return result


def nan(world: World, shards: str, folder: Path) -> dict[str, Any]:
    """Per stage: what the step said, whether it left the state alone, and the loss of the step after it."""
    result = {}
    for stage in range(4):
        run = Run(world, shards, stage)
        run.step()
        before = run.whole()
        poison: Any = None
        if world.rank == world.size - 1:
            poison = next(iter(run.engine.parameters.values())).register_hook(lambda gradient: gradient * float("nan"))
        bad = run.step()
        if poison is not None:
            poison.remove()
        same = all(torch.equal(value, before[name]) for name, value in run.whole().items())
        result[f"zero{stage}"] = {
            "skipped": world.texts(bad.skipped),
            "same": same,
            "steps": run.engine.optimizer_steps(),
            "loss": run.step().loss,
        }
        run.close()
        vetoed = Run(world, shards, stage)
        vetoed.step(), vetoed.step(lambda loss: "left out")
        result[f"zero{stage}"]["vetoed"] = vetoed.step().loss
        vetoed.close()
    return result


if __name__ == "__main__":
    world = start_distributed("cpu")
    done = {"save": save, "load": load, "nan": nan}[sys.argv[1]](world, sys.argv[2], Path(sys.argv[3]))
    if world.main:
        Path(sys.argv[3], f"{sys.argv[1]}{world.size}.json").write_text(json.dumps(done))
    world.barrier()
