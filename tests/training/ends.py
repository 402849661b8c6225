"""Run by test_engine.py on some ranks: engines of all stages end, one after another in one process, and leave nothing behind."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from data.loader import BatchLoader  # noqa: E402
from models.config import ModelConfig  # noqa: E402
from models.lm import LanguageModel  # noqa: E402
from scripts.bench.multi_gpu_worker import RandomTokens  # noqa: E402
from training.config.cli import checked, compose_config  # noqa: E402
from training.engine import Engine  # noqa: E402
from training.result import local_tokens  # noqa: E402
from training.world import World, start_distributed  # noqa: E402
from training.zero import patches  # noqa: E402

OURS = F.linear


class Sums(World):
    """Counts its sums over ranks."""

    count = 0

    def sum(self, values: list[float]) -> list[float]:
        Sums.count += 1
        return super().sum(values)


def left_behind(world: World, stage: int) -> bool:
    """Whether a model is still there after three steps and the end of its engine; a step that is given its tokens waits for one sum of ours, and
    never for the whole device, as DeepSpeed's timer does from the third step on: a CUDA graph of a pass cannot hold that."""
    import deepspeed

    rows = 2 * world.size
    words = ["size=tiny", f"deepspeed=zero{stage}", "train.seq_len=16", "train.micro_batch=2", f"train.global_batch={rows}"]
    config = checked(compose_config([*words, "train.precision=bf16", "train.residual=bf16"]))
    model = LanguageModel(ModelConfig.from_dict({**config.model, "vocab_size": 64, "d_model": 32, "n_layers": 2}))
    model.init_weights(0)
    engine, alive = Engine(model, config, world), weakref.ref(model)
    assert model.residual_dtype == torch.bfloat16
    assert engine.stage == (stage if world.size > 1 else 0), "a single rank has nothing to split"
    with BatchLoader(RandomTokens(16, 64), global_batch=rows, micro_batch=2, replica=world.replica, replicas=world.replicas) as loader:
        for told, batches in zip((1.0, 2.0, 3.0), loader):
            tokens, sums = world.sum([local_tokens(batches)])[0], Sums.count
            with mock.patch.object(
                deepspeed.accelerator.get_accelerator(), "synchronize", side_effect=AssertionError("waits for the device")
            ):
                result = engine.step(batches, 1e-3, tokens=tokens, tell=[told, 1.0].copy)
            assert not result.skipped and Sums.count == sums + 1 and result.told == [told * world.size, world.size]
        for batch in batches:  # a step without a label: there is no mean of its losses, and nothing is updated
            batch.labels.fill_(-100)
        result = engine.step(batches, 1e-3, only_finite=True)
        assert "has a label" in result.skipped and result.loss == 0 and result.tokens == 0 and engine.optimizer_steps() == 3
    if engine.stage in (1, 2):  # nodes that accumulate gradients live no longer than a pass, whose stream they are of
        patches.let_accumulators_go(engine.deepspeed.optimizer)
        for p in model.parameters():
            torch.autograd.graph.get_gradient_edge(p).node.metadata["before"] = True
        gc.collect()
        assert not any("before" in torch.autograd.graph.get_gradient_edge(p).node.metadata for p in model.parameters())
    engine.destroy()
    assert F.linear is OURS, f"ZeRO-{stage} leaves another linear map than torch's"
    del engine, model
    gc.collect()
    return alive() is not None


def main() -> None:
    torch.set_num_threads(1)
    world = Sums(**vars(start_distributed("cpu")))
    left = [stage for stage in (3, 1, 2, 0) if left_behind(world, stage)]
    assert not left, f"models of ZeRO stages {left} are kept alive"
    if world.main:
        print("ok", os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main()
