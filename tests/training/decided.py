"""Run by test_engine.py: steps whose update the device makes, or leaves out, before the host knows the loss, beside steps in which the host decides."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]
os.environ["TRITON_INTERPRET"] = "1"  # of the kernels of tensor lists alone

import torch  # noqa: E402

from kernels import dispatch  # noqa: E402

dispatch.interpreted = lambda: False

from data.loader import BatchLoader  # noqa: E402
from kernels import tensor_lists  # noqa: E402
from models.config import ModelConfig  # noqa: E402
from models.lm import LanguageModel  # noqa: E402
from scripts.bench.multi_gpu_worker import RandomTokens  # noqa: E402
from tests.kernels.interpreter import patch_once  # noqa: E402
from training import engine as engine_module  # noqa: E402
from training import passes  # noqa: E402
from training.config.cli import checked, compose_config  # noqa: E402
from training.config.schema import FaultSection  # noqa: E402
from training.engine import Engine  # noqa: E402
from training.guard.faults import BadStepPolicy  # noqa: E402
from training.world import World, start_distributed  # noqa: E402

BAD = {2: ("loss", math.nan), 3: ("loss", math.inf), 4: ("gradient", math.nan), 5: ("gradient", math.inf)}  # of seven steps


def taken(world: World, only_finite: bool, clip: float, optim: str) -> tuple[list[tuple[float, float, str]], list[torch.Tensor], list[str]]:
    """(loss, norm and what was said of each step, weights and moments at the end, what happened in which order)."""
    words = [
        "size=tiny",
        "model=transformer",
        f"optim={optim}",
        "deepspeed=zero0",
        "train.seq_len=16",
        "train.micro_batch=2",
        "train.global_batch=2",
        f"train.grad_clip={clip}",
    ]
    config = checked(compose_config(words))
    model = LanguageModel(ModelConfig.from_dict({**config.model, "vocab_size": 32, "d_model": 16, "n_layers": 1}))
    model.init_weights(0)
    engine, policy, order = Engine(model, config, world), BadStepPolicy(FaultSection(policy="skip"), None), list[str]()
    said: list[tuple[float, float, str]] = []
    run, step = engine.passes.run, engine.optimizer.step
    sent = passes.sent_to_host

    def with_faults(batches: Any, scale: float) -> torch.Tensor:
        loss = run(batches, scale)
        kind, value = BAD.get(len(said), ("", 0.0))
        if kind == "gradient":
            next(iter(engine.parameters.values())).grad.view(-1)[0] = value  # type: ignore[union-attr]
        return torch.full_like(loss, value) if kind == "loss" else loss

    def read_later(number: torch.Tensor) -> Any:
        read = sent(number)

        def noted() -> float:
            order.append("read")
            return read()

        return noted

    def update(*a: Any) -> Any:
        order.append("update")
        return step(*a)

    engine.passes.run, engine.optimizer.step = with_faults, update  # type: ignore[method-assign,assignment]
    engine_module.sent_to_host = read_later
    with BatchLoader(RandomTokens(16, 32), global_batch=2, micro_batch=2, replica=0, replicas=1) as loader:
        for _, batches in zip(range(7), loader):
            result = engine.step(batches, 1e-2, policy.judge, 32.0, only_finite=only_finite and policy.only_finite)
            said.append((result.loss, result.grad_norm, result.skipped))
            order.append("|")
    optimizer = engine.optimizer
    momenta = [stack.momentum for stack in getattr(optimizer, "stacks", [])]
    steps = [s["step"] for s in optimizer.state.values()]
    state = [
        t.clone() for t in (*steps, *momenta, *(t for p in engine.parameters.values() for t in (p.detach(), *optimizer.state[p].values())))
    ]
    engine_module.sent_to_host = sent
    engine.destroy()
    return said, state, "".join(word[0] for word in order).split("|")[:-1]


def main() -> None:
    torch.set_num_threads(1)
    patch_once()
    tensor_lists.no_triton = lambda device: ""
    world = start_distributed("cpu")
    for clip, optim in ((0.5, "adamw"), (0.0, "muon")):
        host = taken(world, False, clip, optim)
        device = taken(world, True, clip, optim)
        assert [words[2] for words in device[0]] == [""] * 2 + ["loss is not finite"] * 2 + ["gradient norm is not finite"] * 2 + [""]
        assert all(bool(t.isfinite().all()) for t in device[1]) and int(device[1][0]) == 3, "an update was made that had to be left out"
        assert device[2][0] == "rru" and set(device[2][1:]) == {"urr"} and set(host[2]) == {"rru"}, (device[2], host[2])
        torch.testing.assert_close(torch.tensor([w[:2] for w in device[0]]), torch.tensor([w[:2] for w in host[0]]), equal_nan=True)
        assert all(torch.equal(a, b) for a, b in zip(device[1], host[1])), optim
    assert not BadStepPolicy(FaultSection(policy="skip", spike_factor=2.0), None).only_finite
    print("ok")


if __name__ == "__main__":
    main()
