"""The Run object without DeepSpeed: what it fetches, agrees on, saves and says; whole runs of it are in test_runs.py and test_faults.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Reader
from models.config import ModelConfig
from models.lm import LanguageModel
from training import checkpoint, cursor
from training.config.schema import CheckpointSection, Config, TrainSection
from training.errors import UserError
from training.loop import Run
from training.result import StepResult
from training.setup import Start
from training.watch.observe import SignOfLife
from training.world import World

BATCH, T = 2, 8


class Counting(Reader):
    """Sample k is k everywhere; from sample `until` on it cannot be read."""

    seq_len = T

    def __init__(self, until: int) -> None:
        self.until = until

    def samples(self, k_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if k_R.max() >= self.until:
            raise ValueError("the disk is gone.")
        return k_R[:, None].repeat(T + 1, 1), np.zeros((len(k_R), T + 1), np.int32)


class Ranks(World):
    """Rank 0 of one, to whose sums another rank adds what it has to tell: flags for the step after a number of steps."""

    def __init__(self, **tells: int) -> None:
        super().__init__(0, 1, torch.device("cpu"))
        self.tells, self.sums = tells, 0

    def sum(self, values: list[float]) -> list[float]:
        if len(values) != 4:
            return values
        self.sums += 1
        return [value + (self.tells.get(name) == self.sums - 1) for value, name in zip(values, ("asked", "lost", "broken", "tokens"))]


class Steps:
    """An engine that takes no step but keeps what it was given."""

    def __init__(self, world: World) -> None:
        self.world, self.stage, self.matrices, self.plans = world, 0, dict[str, torch.Tensor](), None
        self.module = LanguageModel(
            ModelConfig(vocab_size=64, d_model=32, n_layers=1, mixers={"attention": {"type": "attention", "n_heads": 2}})
        )
        self.parameters = dict(self.module.named_parameters())
        self.taken: list[tuple[list[int], float | None]] = []

    def optimizer_steps(self) -> int:
        return 0

    def follow(self, steps: int) -> None:
        pass

    def news(self) -> list[str]:
        return []

    def step(self, batches: Any, lr: float, is_bad: Any, tokens: float | None, tell: Any, only_finite: bool) -> StepResult:
        self.taken.append(([k for b in batches for k in b.sample_ids], tokens))
        return StepResult(1.0, 1.0, int(tokens or 0), is_bad(1.0), 0.1, told=self.world.sum([1.0, *tell()][1:]))


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Any]:
    lives = []

    def make(world: World | None = None, steps: int = 4, until: int = 10**6, signal: str = "", **section: Any) -> tuple[Run, Steps]:
        config = Config(
            run_dir=str(tmp_path / "run"),
            train=TrainSection(seq_len=T, global_batch=BATCH, micro_batch=1, steps=steps),
            checkpoint=CheckpointSection(**section),
        )
        config.optim.lr = 1e-3
        (tmp_path / "run").mkdir(exist_ok=True)
        engine = Steps(world or Ranks())
        start = Start(cursor.begin(config, [1.0]), None, True, None, "begins", [])
        shards: Any = [(SimpleNamespace(fingerprint="f"), 1.0)]
        life = SignOfLife(tmp_path / "run", 0)
        lives.append(life)
        stop: Any = SimpleNamespace(signal=signal)
        parts: dict[str, Any] = {"start": start, "shards": shards, "reader": Counting(until), "documents": {"config.json": "{}"}}
        return Run(config, engine, **parts, stop=stop, life=life), engine  # type: ignore[arg-type]

    yield make
    for life in lives:
        life.close()


def walk(run: Run) -> None:
    with run:
        while run.goes_on():
            run.take_step()
            run.save_if_due()
        run.finish()


def test_a_step_agrees_on_the_next_one_and_reads_nothing_behind_the_last(made: Any) -> None:
    run, engine = made(steps=4, until=4 * BATCH)  # what lies behind the run's own data must not matter
    walk(run)
    assert engine.taken == [([2 * s, 2 * s + 1], float(BATCH * T)) for s in range(4)]
    assert run.finished and run.world.sums == 1 + 4, "one sum before the first step, and one a step"


def test_a_request_on_another_rank_stops_after_the_step_in_which_it_was_told(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run, engine = made(Ranks(asked=2))
    walk(run)
    assert len(engine.taken) == 2 and not run.finished and run.saved == 2
    assert "stopped by another rank after step 2; the same command goes on" in capsys.readouterr().out
    assert checkpoint.read_state(checkpoint.folder_of(run.run_dir, 2))["samples"] == 2 * BATCH


def test_a_request_before_the_first_step_is_heard(made: Any) -> None:
    run, engine = made(signal="SIGTERM")
    walk(run)
    assert engine.taken == [] and not run.finished


def test_data_that_are_lost_end_the_run_where_they_are_missed(made: Any) -> None:
    run, engine = made(until=3 * BATCH)
    with pytest.raises(UserError, match=r"the disk is gone\. Training stopped after step 3\."):
        walk(run)
    assert len(engine.taken) == 3 and run.saved == 3


def test_data_that_another_rank_lost_end_it_as_well(made: Any) -> None:
    run, engine = made(Ranks(lost=1))
    walk(run)
    assert len(engine.taken) == 1 and not run.finished


def test_a_checkpoint_that_another_rank_could_not_write_ends_the_run(made: Any) -> None:
    run, engine = made(Ranks(broken=1))
    run.world.texts = lambda text: [text, "rank 1: no room"]
    with pytest.raises(UserError, match=r"rank 1: no room"):
        walk(run)
    assert len(engine.taken) == 1


def test_what_is_saved_can_be_read_back_and_is_told(made: Any) -> None:
    run, _ = made(every=2)
    walk(run)
    state = checkpoint.read_state(checkpoint.folder_of(run.run_dir, 4))
    assert state == {**state, **json.loads(json.dumps(run.state()))} and state["fingerprint"] == ["f"] and state["wandb_id"] is None
    assert cursor.read(state, {}, run.config).state() == run.cursor.state()
    rows = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4] and {row.get("saved_step") for row in rows} == {None, 2, 4}
    assert json.loads(run.life.path.read_text())["saved"] == 4 and all(math.isfinite(row.get("lr", 0)) for row in rows)


def test_a_step_that_is_to_end_the_run_does(made: Any) -> None:
    run, engine = made()
    run.policy.judge = lambda loss: "loss is not finite"
    with pytest.raises(UserError, match="Step 1 was not taken"):
        walk(run)
    assert run.step == 0 and len(engine.taken) == 1
