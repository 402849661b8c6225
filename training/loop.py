"""A run from its first step to its last save: what train.py's loop acts on, as an object.

train.py builds the parts, opens a `Run` as a context and says in which order things happen; here is what each of them does.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data.loader import Batch, BatchLoader, Reader
from models.config import ModelConfig
from models.lm import LanguageModel
from training.checkpoint import read_state
from training.config.schema import Config
from training.cost.flops import training_flops_per_token
from training.engine import Engine
from training.errors import UserError
from training.guard.faults import BadStepPolicy, StopRequest
from training.result import local_tokens
from training.saving.saver import Saver
from training.setup import Shards, Start
from training.watch.metrics import Metrics, Stopwatch
from training.watch.observe import RankWatch, SignOfLife
from training.watch.startup import StartUp
from training.watch.trace import Tracer


def documents_of(settings: ModelConfig, shards: Shards, resolved_yaml: str) -> dict[str, str]:
    """The text files that every checkpoint gets, by name: the model, the run, and the tokenizer of its data."""
    source = shards[0][0]
    return {
        "config.json": json.dumps(settings.to_dict(), indent=1) + "\n",
        "run.json": json.dumps(OmegaConf.to_container(OmegaConf.create(resolved_yaml)), indent=1) + "\n",
        "tokenizer.json": source.tokenizer().to_str(),
        "tokenizer_config.json": json.dumps(source.tokenizer_config(), indent=1) + "\n",
    }


@dataclass
class Agreed:
    """What the ranks know of the next step before they take it, summed over them.

    asked: ranks that were asked to stop; lost: ranks that could not read the next batch; broken: ranks that could not write their part of a
    checkpoint; tokens: labels of the next global batch.
    """

    asked: float = 0.0
    lost: float = 0.0
    broken: float = 0.0
    tokens: float = 0.0


class Run:
    """A run that is ready for its next step. `with run:` opens its checkpoints (`saver`) and its data (`loader`); all ranks call its methods together.

    cursor: where it stands; total: the number of its last step; saved: the step of the last save that was begun.
    Of the next step, settled while the one before it is under way: batches, this rank's micro-batches; waited, the seconds that fetching them took;
    lost, why they could not be read, or ''; agreed, what all ranks say of it.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        *,
        start: Start,
        shards: Shards,
        reader: Reader,
        documents: dict[str, str],
        stop: StopRequest,
        life: SignOfLife,
        start_up: StartUp | None = None,
    ) -> None:
        self.config, self.engine, self.world, self.shards = config, engine, engine.world, shards
        self.reader, self.documents, self.stop, self.life = reader, documents, stop, life
        self.cursor, self.begun = start.cursor, start.folder
        self.total, self.saved, self.run_dir = config.total_steps, start.cursor.step, Path(config.run_dir)
        self.metrics = self._metrics(engine.module, start)
        self.ranks = RankWatch(self.world, config.train.log_every)
        first_traced = self.step + config.profile_start
        self.tracer = Tracer(
            config.profile, self.run_dir, self.world.rank, self.world.device, first_traced, config.profile_steps, self.metrics.say
        )
        self.policy = BadStepPolicy(config.faults, self.run_dir / "faults.jsonl" if self.world.main else None)
        if start.folder is not None and start.cursor.step > start.cursor.first_step:  # a run of its own has no steps to judge by yet
            self.policy.load(read_state(start.folder).get("faults") or self.policy.state())
        self.start_up = start_up  # until its first step is told
        self.batches: list[Batch] = []
        self.waited, self.lost, self.agreed = 0.0, "", Agreed()

    def _metrics(self, model: LanguageModel, start: Start) -> Metrics:
        flops = training_flops_per_token(model, self.config.train.seq_len)
        metrics = Metrics(self.run_dir, self.config, self.world.device, self.world.size, flops, self.world.main)
        metrics.again_per_token = model.recomputed_flops_per_token(self.config.train.seq_len, self.config.train.compile)
        metrics.wandb_id = start.wandb_id
        self.world.on_main(self.run_dir, lambda: metrics.open(self.step, start.wandb_id))
        metrics.say(start.message)
        return metrics

    @property
    def step(self) -> int:
        """How many optimizer steps are behind the run."""
        return self.cursor.step

    @property
    def finished(self) -> bool:
        return self.step >= self.total

    def __enter__(self) -> Run:
        config, world, say = self.config, self.world, self.metrics.say
        saver = Saver(
            self.run_dir,
            self.engine,
            config.checkpoint,
            self.documents,
            say,
            minutes=config.deepspeed.timeout_minutes,
            saved=self.step,
            alive=self.beat,
            begun=self.begun,
        )
        with contextlib.ExitStack() as opened:
            self.saver = opened.enter_context(saver)
            self.loader = opened.enter_context(
                BatchLoader(
                    self.reader,
                    global_batch=config.train.global_batch,
                    micro_batch=config.train.micro_batch,
                    replica=world.replica,
                    replicas=world.replicas,
                    slice_of=world.slice_of,
                    start_step=self.step,
                    first_sample=self.cursor.samples,
                    prefetch=config.data.prefetch,
                    pin=world.device.type == "cuda",
                )
            )
            self.agreed = Agreed(*world.sum(self.look_ahead(self.step)))
            self.opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self.opened.__exit__(*error)

    def look_ahead(self, step: int) -> list[float]:
        """Fetches the micro-batches of the step after `step`, if there is to be one. Returns this rank's part of `Agreed`, which the ranks add up."""
        watch = Stopwatch()
        self.batches, self.lost = self.loader.fetch() if step < self.total else ([], "")
        self.waited = watch.lap()
        flags = (self.stop.signal, self.lost, self.saver.problem)
        return [*(float(bool(text)) for text in flags), local_tokens(self.batches)]

    def goes_on(self) -> bool:
        """Whether the ranks take another step. Raises UserError on all of them when one could not write its part of a checkpoint."""
        if self.finished:
            return False
        if self.agreed.broken:
            self.saver.raise_together()
        return not self.agreed.asked and not self.agreed.lost

    def take_step(self) -> None:
        """The next optimizer step, and what is written about it. Its one sum over ranks also settles `agreed` for the step after it, so a request to
        stop that comes later than that sum waits for the end of that step. Raises UserError where a bad step is to end the run."""
        batches, waited, step, seen = self.batches, self.waited, self.step, self.cursor.tokens
        lr = self.config.lr_at(step, seen)
        self.tracer.before(step + 1)
        self.engine.follow(step)
        self.engine.module.begin_step(self.config.seed, step)
        result = self.engine.step(
            batches, lr, self.policy.judge, self.agreed.tokens, lambda: self.look_ahead(step + 1), only_finite=self.policy.only_finite
        )
        self.policy.record(step + 1, result, [sample for batch in batches for sample in batch.sample_ids])
        self.agreed = Agreed(*result.told)
        self.cursor.advance(self.config)
        self.tracer.after(self.step)
        for sentence in self.engine.news():
            self.metrics.say(sentence)
        ranks = self.ranks.step(self.step, result, waited)
        if ranks and self.engine.plans is not None:
            ranks |= self.engine.plans.report()
        self.metrics.step(self.step, result, lr, waited, ranks, self.cursor.tokens)
        if self.start_up is not None:
            self.start_up.lap("first step")
            self.metrics.say(self.start_up.line())
            self.metrics.write(self.step, **self.start_up.row())
            self.start_up = None
        self.beat(self.saver.saved)

    def save_if_due(self) -> None:
        """A checkpoint where checkpoint.every or checkpoint.milestones ask for one after this step; tells what was saved meanwhile."""
        settings = self.config.checkpoint
        if settings.every and self.step % settings.every == 0 or self.step in settings.milestones:
            self.save()
        self.tell()

    def save(self) -> None:
        self.saver.save(self.state())
        self.saved = self.step

    def finish(self) -> None:
        """The last save, waited for. Raises UserError on all ranks when one of them could not read its data any more."""
        self.tracer.close()
        if self.step > self.saved and (self.config.checkpoint.at_end or not self.finished):
            self.save()
        self.saver.finish()
        self.tell()
        reasons = [text for text in self.world.texts(self.lost) if text]
        if reasons:
            raise UserError(f"{reasons[0]} Training stopped after step {self.step}.")
        if not self.finished:
            again = "the same command" if self.config.train.resume == "auto" else "the same command with train.resume=auto"
            self.metrics.say(f"stopped by {self.stop.signal or 'another rank'} after step {self.step}; {again} goes on from there.")

    def close(self) -> None:
        """Closes what the run has written, and leaves the process group with the other ranks. Raises UserError on all of them where a result of the
        last evaluation was not written; a start of the finished run evaluates again."""
        self.metrics.close()
        lost = self.world.texts("\n".join(self.metrics.lost.values()))[0]
        self.life.close(stopped=not self.finished)
        self.world.barrier()  # a launcher that sees one rank end with another status than 0 kills the others
        self.engine.close()
        if lost:
            raise UserError(lost.splitlines())

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside weights and moments (state.json)."""
        learnt = {} if self.engine.plans is None else {"plans": self.engine.plans.state()}
        prints = [s.fingerprint for s, _ in self.shards]
        return {**self.cursor.state(), "fingerprint": prints, "wandb_id": self.metrics.wandb_id, "faults": self.policy.state(), **learnt}

    def tell(self) -> None:
        """Writes what the saves since the last call took, and a sign of life."""
        for row in self.saver.news():
            self.metrics.write(self.step, **row)
        self.beat(self.saver.saved)

    def beat(self, saved: int) -> None:
        """A sign of life for the supervisor; saved: the step of the newest complete checkpoint."""
        self.life.beat(self.step, saved)
