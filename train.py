"""Pretrains a language model. One process, torchrun or the deepspeed launcher, CPU or GPU: the same program.

    python train.py                                     the tiny hybrid on the demo corpus
    deepspeed --num_gpus 8 train.py model=paragru size=400m data=shards data.path=DIR train.precision=bf16 train.global_batch=64
    python train.py --help                              all groups and keys
    python train.py -m optim.lr=1e-3,3e-3 seed=0,1      a sweep: a run for each combination, and a table

It reads top to bottom: build, resume, loop, evaluate, save.
"""

from __future__ import annotations

if __name__ == "__main__":
    from kernels import interrupts

    interrupts.quiet()  # before anything large is loaded

import json
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from training.config import cli
from training.config.schema import Config
from training.errors import STOPPED, Stopped, UserError, sentence_of


@hydra.main(version_base=None, config_path=str(Path(__file__).resolve().parent / "configs"), config_name="train")
def main(composed: DictConfig) -> float | None:
    """Hydra's entry: everything a user can get wrong ends in a sentence and status 2, a stop request in a checkpoint and status 75."""
    if cli.in_sweep():
        from training.sweep import job

        return job(composed, Path(__file__).resolve())
    try:
        config = cli.checked(composed)
        return train(config, cli.resolved_yaml(composed, config))
    except UserError as error:
        cli.report(error)
        sys.exit(2)
    except Stopped:
        sys.exit(STOPPED)
    except OSError as error:
        if not cli.refused(error):
            raise
        cli.report(UserError(sentence_of(error)))
        sys.exit(2)


def train(config: Config, resolved_yaml: str) -> float | None:
    """Runs `config` to its end; returns the last held-out bits per byte. Raises Stopped when it was asked to stop and has saved."""
    from training.setup import model_config, open_data, open_reader, take_up

    if config.dry_run:
        from training.cost.flops import dry_run_report

        print(dry_run_report(config, *model_config(config, None)))
        return None

    # Build
    from data.loader import BatchLoader
    from evals.in_loop import build_evaluator
    from models.lm import LanguageModel
    from training import checkpoint
    from training.cost.fit import misfit
    from training.cost.flops import training_flops_per_token
    from training.engine import Engine, start_distributed
    from training.guard.agreement import agree
    from training.guard.faults import BadStepPolicy, StopRequest
    from training.saving.saver import Saver
    from training.watch.metrics import Metrics, Stopwatch
    from training.watch.observe import RankWatch, SignOfLife
    from training.watch.trace import Tracer

    shards, _, problem = open_data(config)
    world = start_distributed(config.train.device, config.deepspeed.timeout_minutes, config.parallel.sequence)
    problem = problem or misfit(config, shards, world)
    agree(world, config, [s.fingerprint for s, _ in shards or ()], problem)
    torch.manual_seed(config.seed)
    settings, _ = model_config(config, shards)
    model = LanguageModel(settings)
    model.init_weights(config.seed)
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    run_dir = Path(config.run_dir)
    stop = StopRequest()

    # Resume
    start = take_up(config, world, model, shards, resolved_yaml)
    life = SignOfLife(run_dir, world.rank)
    engine = Engine(model, config, world)
    if start.folder is not None and start.moments:
        checkpoint.restore_optimizer(start.folder, engine)
    cursor, reader = start.cursor, open_reader(config, shards, start.cursor.order)
    metrics = Metrics(run_dir, config, world.device, world.size, training_flops_per_token(model, config.train.seq_len), world.main)
    metrics.open(cursor.step, start.wandb_id)
    metrics.say(start.message)
    ranks = RankWatch(world, config.train.log_every)
    tracer = Tracer(
        config.profile, run_dir, world.rank, world.device, cursor.step + config.profile_start, config.profile_steps, metrics.say
    )
    evaluator = build_evaluator(config, engine, shards, metrics)
    policy = BadStepPolicy(config.faults, run_dir / "faults.jsonl" if world.main else None)

    documents = {
        "config.json": json.dumps(settings.to_dict(), indent=1) + "\n",
        "run.json": json.dumps(OmegaConf.to_container(OmegaConf.create(resolved_yaml)), indent=1) + "\n",
        "tokenizer.json": shards[0][0].tokenizer().to_str(),
        "tokenizer_config.json": json.dumps(shards[0][0].tokenizer_config(), indent=1) + "\n",
    }

    def state() -> dict[str, Any]:
        return {**cursor.state(), "fingerprint": [s.fingerprint for s, _ in shards], "wandb_id": metrics.wandb_id}

    def tell(saver: Saver, step: int) -> None:
        for row in saver.news():
            metrics.write(step, **row)

    # Loop
    total, step, saved, trouble = config.total_steps, cursor.step, cursor.step, ""
    with (
        Saver(
            run_dir,
            engine,
            config.checkpoint,
            documents,
            metrics.say,
            config.deepspeed.timeout_minutes,
            cursor.step,
            lambda: life.beat(step, saver.saved),
        ) as saver,
        BatchLoader(
            reader,
            config.train.global_batch,
            config.train.micro_batch,
            world.replica,
            world.replicas,
            cursor.step,
            config.data.prefetch,
            world.device.type == "cuda",
            world.slice_of,
            cursor.samples,
        ) as loader,
    ):
        while step < total:
            watch = Stopwatch()
            micro_batches, trouble = loader.fetch()
            waited = watch.lap()
            asked, lost, broken = world.sum([float(bool(text)) for text in (stop.signal, trouble, saver.problem)])
            if broken:
                saver.raise_together()
            if asked or lost:
                break
            lr = config.lr_at(step, cursor.tokens)
            tracer.before(step + 1)
            result = engine.step(micro_batches, lr, policy.judge)
            policy.record(step, result, [i for batch in micro_batches for i in batch.sample_ids])
            cursor.advance(config)
            step = cursor.step
            tracer.after(step)
            seen = ranks.step(step, result, waited)
            metrics.step(
                step, result.loss, result.grad_norm, lr, result.tokens, result.seconds, waited, result.skipped, seen, cursor.tokens
            )
            life.beat(step, saver.saved)
            evaluator.at(step)
            if config.checkpoint.every and step % config.checkpoint.every == 0 or step in config.checkpoint.milestones:
                saver.save(state())
                saved = step
            tell(saver, step)
            life.beat(step, saver.saved)

        # Save, and the last evaluation
        tracer.close()
        finished = step >= total
        if step > saved and (config.checkpoint.at_end or not finished):
            saver.save(state())
        saver.finish()
        tell(saver, step)
        life.beat(step, saver.saved)
        reasons = [text for text in world.texts(trouble) if text]
        if reasons:
            raise UserError(f"{reasons[0]} Training stopped after step {step}.")
        if not finished:
            how = "the same command" if config.train.resume == "auto" else "the same command with train.resume=auto"
            metrics.say(f"stopped by {stop.signal or 'another rank'} after step {step}; {how} goes on from there.")
        bits = evaluator.at_end(step) if finished else None
    metrics.close()
    life.close(stopped=not finished)
    world.barrier()  # a launcher that sees one rank end with another status than 0 kills the others
    engine.close()
    if not finished:
        raise Stopped
    return bits


def _entry() -> Any:
    return cli.run(main)


if __name__ == "__main__":
    sys.exit(_entry())
