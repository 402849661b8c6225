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

import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from training.config import cli
from training.config.schema import Config
from training.errors import STOPPED, Stopped, UserError, sentence_of
from training.launch import leave


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
    from training.setup import loading_the_optimizers, model_config, open_data, open_reader, take_up

    if config.dry_run:
        from training.cost.flops import dry_run_report

        print(dry_run_report(config, *model_config(config, None)))
        return None

    # Build
    from evals.in_loop import build_evaluator
    from models.lm import LanguageModel
    from training import checkpoint
    from training.cost.fit import misfit, recomputation_of
    from training.engine import Engine
    from training.guard.agreement import agree
    from training.guard.faults import StopRequest
    from training.loop import Run, documents_of
    from training.watch.observe import SignOfLife
    from training.watch.startup import StartUp
    from training.world import start_distributed

    start_up = StartUp()
    start_up.lap("imports")
    shards, _, problem = open_data(config)
    start_up.lap("data")
    world = start_distributed(config.train.device, config.deepspeed.timeout_minutes, config.parallel.sequence)
    start_up.lap("process group")
    problem = problem or misfit(config, shards, world)
    agree(world, config, [s.fingerprint for s, _ in shards or ()], problem)
    torch.manual_seed(config.seed)
    settings, _ = model_config(config, shards)
    model = LanguageModel(settings)
    remade, told = recomputation_of(config, settings, world)
    model.set_activation_checkpointing(remade)
    if config.distill.teacher is not None:
        from training.distill import begin

        begin(config, model, world, None if config.data.reader == "synthetic" else shards[0][0].tokenizer())
    stop = StopRequest()
    start_up.lap("model")

    # Resume
    with loading_the_optimizers():
        start = take_up(config, world, model, shards, resolved_yaml)
    start.message += f"\n{told}" if told else ""
    life = SignOfLife(Path(config.run_dir), world.rank)
    start_up.lap("weights")
    engine = Engine(model, config, world)
    start_up.lap("DeepSpeed")
    if start.folder is not None and start.moments:
        checkpoint.restore_optimizer(start.folder, engine)
    reader = open_reader(config, shards, start.cursor.order)
    documents = documents_of(settings, shards, resolved_yaml)
    run = Run(config, engine, start=start, shards=shards, reader=reader, documents=documents, stop=stop, life=life, start_up=start_up)
    evaluator = build_evaluator(config, engine, shards, run.metrics)

    # Loop
    with run:
        while run.goes_on():
            run.take_step()
            evaluator.at(run.step)
            run.save_if_due()

        # Save, and the last evaluation
        run.finish()
        bits = evaluator.at_end(run.step) if run.finished else None
    run.close()
    if not run.finished:
        raise Stopped
    return bits


def _entry() -> Any:
    return cli.run(main)


if __name__ == "__main__":
    leave(_entry)
