"""Forward and backward passes of a step: through DeepSpeed, whose hooks then reduce the gradients, or past it, so that they can be replayed as CUDA
graphs (training/graph.py); under ZeRO-1 and 2 their gradients are reduced behind the last of them (training/zero/at_once.py), under ZeRO-3 where
its weights stay whole for a step (training/zero/whole.py).

    passes = Passes(deepspeed_engine, model, config, world)
    loss_sum = passes.run(micro_batches, scale)
    passes.reduce()
    passes.settle(the sums over ranks of passes.words())        # with whatever else the ranks tell each other in this step
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from kernels.linear import float8
from models.parallel import split
from training.config.schema import Config
from training.graph import GraphedPass, may_replay
from training.initial_state import InitialStates
from training.world import World
from training.zero import policy
from training.zero.at_once import AtOnce
from training.zero.whole import Whole


def sent_to_host(number: Tensor) -> Callable[[], float]:
    """Has a number copied to the host behind all that is queued; what is returned waits for the copy, and not for what is queued after it."""
    if number.device.type != "cuda":
        return number.item
    copy, event = torch.empty((), dtype=number.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(number, non_blocking=True)
    event.record()

    def read() -> float:
        event.synchronize()
        return copy.item()

    return read


class Passes:
    """graphed: passes past DeepSpeed, where they may be graphs or weights stay whole; at_once: what reduces their gradients, where a ZeRO stage divides
    these."""

    def __init__(self, deepspeed: Any, model: Any, config: Config, world: World) -> None:
        self.deepspeed, self.module, self.config, self.world = deepspeed, model, config, world
        self.stage, t = policy.stage_of(config, world.size), config.train
        self.initial = InitialStates(t.initial_state, t.initial_sigma, t.initial_drop, seed=config.seed * 65537 + world.rank)
        graphs = may_replay(config, world, model) and (not self.stage or policy.may_reduce_at_once(config, world.size))
        self.whole = policy.keeps_whole(config, world.size)
        self.graphed = GraphedPass(model, world.device, t.precision == "bf16") if graphs or self.whole else None
        if self.graphed is not None and not graphs:
            self.graphed.why_not = "not wanted"
        self.at_once: AtOnce | Whole | None = None
        if self.whole or graphs and self.stage:
            self.at_once = (Whole if self.whole else AtOnce)(deepspeed.optimizer, config.deepspeed.bucket_bytes // 4)

    def news(self) -> list[str]:
        """What was settled for the passes that follow, a sentence each."""
        return [] if self.graphed is None else self.graphed.news()

    def forget(self) -> None:
        """Drops recorded passes: the model's are made of other operations from now on."""
        if self.graphed is not None:
            self.graphed.forget()

    def run(self, micro_batches: list[Batch], scale: float) -> Tensor:
        """Gradients of `scale` times the summed losses; returns this rank's sum of token losses, fp64, without waiting for it."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        streams = self.config.data.reader == "stream"
        if self.config.train.fp8 and (self.stage < 3 or self.whole):  # where no rank keeps a weight whole it is cast at every use
            float8.begin_step(float8.step + 1)
        self.deepspeed.set_gradient_accumulation_boundary(False)
        for index, batch in enumerate(micro_batches):
            self.deepspeed.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            replayed = self.graphed.run(batch, scale) if self.graphed is not None else None
            if replayed is not None:
                loss_sum += replayed
                if index == len(micro_batches) - 1 and self.world.size > 1 and not self.stage:
                    self.deepspeed.allreduce_gradients()  # its backward, which does so after a pass as written, has not run
                continue
            batch = batch.to(self.world.device)
            start_state = self.initial.before(self.module, index, len(batch.labels), batch.segment_ids, streams)
            # Losses and gradients of slices are sums over tokens like those of rows, so the scale is the same for both.
            with split(self.module, self.world.group) if self.world.sequence > 1 else nullcontext():
                if self.at_once is not None and self.graphed is not None:  # a pass that DeepSpeed does not see, as those that are replayed
                    loss_sum += self.graphed.as_written(batch, scale)
                    continue
                output = self.deepspeed(batch.input_ids, labels=batch.labels, segment_ids=batch.segment_ids, state=start_state)
                if start_state is not None:
                    self.initial.after(index, output.state)
                loss_sum += output.loss_sum.detach().double()
                self.deepspeed.backward((output.loss_sum + output.z_loss_sum) * scale, scale_wrt_gas=False)
        return loss_sum

    def reduce(self) -> None:
        """Sums over ranks the gradients that DeepSpeed has not summed in the passes. Collective."""
        if self.at_once is not None:
            self.at_once.reduce()

    def words(self) -> list[float]:
        """What the other ranks have to know of this one's passes."""
        return [float(bool(self.graphed.why_not))] if isinstance(self.at_once, AtOnce) and self.graphed is not None else []

    def settle(self, words: list[float]) -> None:
        """How passes run from the next step on, from the words of all ranks added up. One that can no longer replay its passes has all of them leave
        the reduction to DeepSpeed: a rank that reduced at once beside another that does not would wait for it for ever."""
        if isinstance(self.at_once, AtOnce) and self.graphed is not None and any(words):
            self.at_once.give_up()
            self.at_once = None
            self.graphed.why_not = self.graphed.why_not or "another rank has to run them so"
