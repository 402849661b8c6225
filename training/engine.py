"""One optimizer step of a model under DeepSpeed, on any number of ranks.

`Engine.step` takes a list of micro-batches so that the gradient is that of (summed token loss of the whole global batch) / (its token count),
whatever the split into ranks and micro-batches: DeepSpeed's own divisions are undone. Parameters are always fp32; with precision bf16 the matrix
products run in bf16 under autocast, recurrences stay fp32. Beside it: training/passes.py (forward and backward), training/world.py (ranks, how
they come together), training/zero/policy.py (which ZeRO), training/zero/patches.py (what is changed in DeepSpeed).

What a step waits for over ranks. One sum stands between the backward pass and the optimizer: that of the loss, without which nobody could veto
the step. Whatever else the ranks have to agree on before the next step rides along with it (`tell`), such as that step's token count: its losses
are divided by it, so it has to be known before its backward pass begins. ZeRO adds a second wait inside its own step, for the norm of the
gradients: clipping and the veto of a norm that is not finite need it, and it is there only when ZeRO has reduced the last gradient. Without ZeRO
(stage 0) gradients are whole on every rank and their norm costs no wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from data.loader import Batch
from models.block import Block
from training import wrappers
from training.choices import choose_kernels, residual_dtype
from training.config.schema import Config
from training.graph import GraphedUpdate
from training.optim import MuonWithAdamW, SkippableAdamW, optimizer_of
from training.optim.clip import clip, norm_ahead
from training.passes import Passes, sent_to_host
from training.plans import plans_of
from training.result import StepResult, local_tokens
from training.world import World
from training.zero import patches, policy
from training.zero.parameters import assert_fp32, gathered


class Engine:
    """A DeepSpeed engine around a LanguageModel and its optimizer."""

    def __init__(self, model: nn.Module, config: Config, world: World) -> None:
        import deepspeed

        policy.check_tools(config, world.device, world.size)
        patches.load_muon_uncompiled()
        self.config, self.world = config, world
        self.module = model.to(world.device)
        self.optimizer: SkippableAdamW | MuonWithAdamW = optimizer_of(config, model, world)
        self.parameters = dict(model.named_parameters())
        if self.stage == 3:  # a block is gathered as one: a fetch for each of its dozen matrices and norms costs the host more
            deepspeed.utils.set_z3_leaf_modules(model, [Block])
        t = config.train
        choose_kernels(t)
        model.residual_dtype = residual_dtype(t)  # type: ignore[assignment]
        largest = max(p.numel() for p in self.parameters.values())
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=policy.deepspeed_config(config, world.size, largest)
        )
        if world.size == 1 and not self.stage:
            patches.keep_gradients_in_place(self.deepspeed)
        if self.stage and config.deepspeed.offload_optimizer == "none":
            patches.norm_in_few_launches(self.deepspeed.optimizer, world.device)
            if self.stage < 3:
                patches.keep_views(self.deepspeed.optimizer)
            if self.stage < 3 and world.device.type == "cuda":
                patches.clip_as_read(self.deepspeed.optimizer)
        if self.stage == 3:
            patches.list_parameters_once(module for module in model.modules() if isinstance(module, Block))
        if policy.gathers_alike(config, world.size) and not policy.keeps_whole(config, world.size):
            patches.gather_small_at_once(self.deepspeed.optimizer)
        assert_fp32(self.parameters)
        self.steps_taken, self.whole_norm = 0, math.nan
        wrapper, settings = wrappers.KINDS.settled(config.optim.wrapper, config)
        wrapper.wrap(self, settings)
        self.plans = plans_of(model, world)
        self.passes = Passes(self.deepspeed, model, config, world)
        if isinstance(self.optimizer, MuonWithAdamW) and self.passes.graphed is not None:
            self.optimizer.replay = GraphedUpdate(self.passes.graphed)
        if config.train.compile:
            self.deepspeed.compile()

    def news(self) -> list[str]:
        """What the last step settled for those that follow, a sentence each."""
        return self.passes.news()

    def follow(self, steps: int) -> None:
        """Tells the engine and the model that `steps` steps of the run are behind the next one."""
        self.steps_taken = steps
        self.passes.initial.begin_step(steps)
        model: Any = self.module
        if model.follow(self.config.share_at(steps)):
            self.passes.forget()

    def norm_now(self) -> float:
        """The norm of the gradients before clipping, from when it is known in a step until the next."""
        return self.whole_norm if not self.stage else float(self.deepspeed.optimizer._global_grad_norm)

    @property
    def matrices(self) -> dict[str, nn.Parameter]:
        """The parameters that Muon updates, by name; AdamW has the others."""
        return self.optimizer.matrices if isinstance(self.optimizer, MuonWithAdamW) else {}

    @property
    def stage(self) -> int:
        """The ZeRO stage that is run, see `policy.stage_of`."""
        return policy.stage_of(self.config, self.world.size)

    def set_lr(self, lr: float) -> None:
        """The rate of the next step, of which every group takes its own multiple."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

    def step(
        self,
        micro_batches: list[Batch],
        lr: float,
        is_bad: Callable[[float], str] | None = None,
        tokens: float | None = None,
        tell: Callable[[], list[float]] | None = None,
        only_finite: bool = False,
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        is_bad: may veto the step from the global mean loss; it returns the reason, or ''. only_finite: it vetoes every loss that is not finite, and no
        other, so that the device may decide where it has what that takes, and the host is not waited for. tokens: `local_tokens` of all ranks together, where
        they are known already; else a sum over ranks of its own counts them. tell: called once the losses are computed; the numbers it returns,
        equally many on every rank, are summed over ranks together with the loss. A step without a label is left out.
        """
        start, clock = time.perf_counter(), self.world.clock
        if clock is not None:
            clock.lap()
        tokens = self.world.sum([local_tokens(micro_batches)])[0] if tokens is None else tokens
        if not tokens:
            is_bad, only_finite = (lambda loss: "no token of its batch has a label"), False
        over = max(tokens, 1.0)
        self.set_lr(lr)
        loss = self.passes.run(micro_batches, self.world.size / over)  # DeepSpeed averages over ranks, and we sum over tokens
        if self.plans is not None:
            self.plans.collect()
        read_loss = sent_to_host(loss)
        self.passes.reduce()  # the device is at it while the host reads the loss and asks for data
        alone = only_finite and self.world.size == 1 and not self.stage  # over several ranks the loss is the sum of all
        read_norm = None if self.stage else self._norm_ahead(loss if alone else None)
        decided = alone and self.optimizer.leaves_out  # the update, prepared, is then queued right behind the norm
        if decided:
            self.deepspeed.step()
        local_loss = read_loss()
        telling = time.perf_counter()
        words = tell() if tell is not None else []
        telling = time.perf_counter() - telling
        learnt = self.plans.words() if self.plans is not None else []
        of_passes = self.passes.words()
        loss_sum, *told = self.world.sum([local_loss, *of_passes, *learnt, *words])
        self.passes.settle([told.pop(0) for _ in of_passes])
        self._learn([told.pop(0) for _ in learnt])
        norm, skipped = self._update(loss_sum / over, is_bad, read_norm, decided)
        seconds = time.perf_counter() - start - telling
        return StepResult(loss_sum / over, norm, int(tokens), skipped, seconds, clock.lap() if clock is not None else 0.0, told)

    def _learn(self, words: list[float]) -> None:
        """Settles the plans of the steps that follow, from what all ranks' solves needed in this one; graphs are of the plans before."""
        if self.plans is not None and self.plans.decide(words, self.world.size, self._of_first):
            self.passes.forget()

    def _of_first(self, values: list[float]) -> list[float]:
        """The first rank's numbers. Collective."""
        return self.world.sum(values if self.world.main else [0.0] * len(values))

    def _norm_ahead(self, loss: Tensor | None) -> Callable[[], float]:
        """What reads the norm of whole gradients, and clips them. Where it can be, the norm is queued behind the passes and the optimizer looks for its
        tensors, while the device is at these: what the host does once the loss is known, the device waits for. loss: without which no step is taken
        unless it is finite."""
        parameters, limit = self.parameters.values(), self.config.train.grad_clip
        norm = norm_ahead(parameters, self.optimizer, limit, loss)
        if norm is None:
            return lambda: clip(parameters, limit)
        self.optimizer.prepare()
        return sent_to_host(norm)

    def _update(
        self, loss: float, is_bad: Callable[[float], str] | None, read_norm: Callable[[], float] | None, decided: bool
    ) -> tuple[float, str]:
        """(norm of the gradients before clipping, '') with the update made, or (norm, why not) with weights and moments as they were. read_norm: None
        under ZeRO, whose step computes the norm. decided: the device has made the update, or left it out."""
        skipped = is_bad(loss) if is_bad else ""
        norm = read_norm() if read_norm is not None else None
        self.whole_norm = norm if norm is not None else math.nan
        if not skipped and norm is not None and not math.isfinite(norm):
            skipped = "gradient norm is not finite"
        if decided:
            assert norm is not None
            return norm, skipped
        self.optimizer.skip_next = bool(skipped)
        before = self.deepspeed.skipped_steps
        self.deepspeed.step()
        self.optimizer.skip_next = False
        if norm is None:
            told = self.deepspeed.get_global_grad_norm()
            norm = float(told) if told is not None else math.nan
        if not skipped and (self.deepspeed.skipped_steps > before or not math.isfinite(norm)):
            skipped = "gradient norm is not finite"
        return norm, skipped

    def gathered(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Context in which the named parameters are whole on every rank (ZeRO-3 splits them), and one rank alone may run the module."""
        return (
            gathered(self.module, [self.parameters[name] for name in names]) if self.stage == 3 and not self.passes.whole else nullcontext()
        )

    def link_moments(self) -> None:
        """To be called before moments are read or written."""
        if self.stage in (1, 2):
            patches.link_moments(self.deepspeed.optimizer)

    def optimizer_steps(self) -> int:
        """Updates the optimizer has made (Adam's own counter)."""
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return max(steps, default=0)

    def destroy(self) -> None:
        """Frees what DeepSpeed holds, and what it would leave behind."""
        self.deepspeed.destroy()
        patches.let_go(self.stage)

    def close(self) -> None:
        """Leaves the process group."""
        self.destroy()
        if self.world.clock is not None:
            self.world.clock.remove()
        if dist.is_initialized():
            dist.destroy_process_group()
