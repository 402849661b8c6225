"""The cells of the table of scripts/studies/tracking.py: small models trained on generated tasks, by scripts/studies/trainer.py.

`train_cell` is a generator: it hands the device a burst of steps and yields, so that one process keeps several cells going on streams of
their own. On a GPU a step is one CUDA graph over samples that lie on the device. B rows of a batch, T length, n length of a curriculum stage.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.synthetic import build_task
from data.synthetic.source import SyntheticReader
from data.synthetic.task import IGNORE, Draws, Task
from evals.measures.tracking import accuracy_by_length
from models.config import ModelConfig
from models.contract import SequenceMixer
from models.lm import LanguageModel
from scripts.studies.graphed import GraphedStep
from scripts.studies.trainer import Trainer
from training.schedule import lr_factor

# Task settings, in order of importance. bound: of the diagonal cells' recurrent weights (published: none for parity, 0.9 elsewhere;
# none for the other automata too, since a bound keeps a channel from flipping its state). 2L: two layers. 2-next: the second reading of
# "2-hop", the token two places after the last occurrence (docs/state_tracking.md). weight: of its share of the time.
TASKS: dict[str, dict[str, Any]] = {
    "parity": {"task": {"name": "parity"}, "bound": None, "steps": 6000},
    "mqar": {
        "task": {"name": "mqar", "pairs": 2, "symbols": 128},
        "bound": 0.9,
        "steps": 120000,
        "lr": 2e-2,
        "batches": 2,
        "weight": 8,
        "samples": 400_000,
    },
    "1-hop": {"task": {"name": "khop", "hops": 1, "symbols": 10}, "bound": 0.9, "steps": 8000},
    "2-next": {"task": {"name": "khop", "hops": 2, "symbols": 5, "rule": "successor"}, "bound": 0.9, "steps": 8000},
    "2-hop": {"task": {"name": "khop", "hops": 2, "symbols": 5}, "bound": 0.9, "steps": 16000},
    "2-hop-2L": {"task": {"name": "khop", "hops": 2, "symbols": 5}, "bound": 0.9, "steps": 6000, "layers": 2},
    "S3": {"task": {"name": "word_problem", "group": "s3"}, "bound": None, "steps": 12000},
    "A5": {"task": {"name": "word_problem", "group": "a5"}, "bound": None, "steps": 12000},
    "mod-5": {"task": {"name": "modular_arithmetic", "modulus": 5}, "bound": None, "steps": 12000},
    "cycle-5": {"task": {"name": "cycle_navigation", "modulus": 5}, "bound": None, "steps": 8000},
    "keep-5th": {"task": {"name": "keep_nth", "n": 5, "symbols": 128}, "bound": 0.9, "steps": 6000},
    "copying": {"task": {"name": "copying", "tokens": 8, "symbols": 14}, "bound": 0.9, "steps": 8000},
    "mqar-8": {"task": {"name": "mqar", "pairs": 8, "symbols": 128}, "bound": 0.9, "steps": 24000, "lr": 2e-2, "batches": 2},
    "S4": {"task": {"name": "word_problem", "group": "s4"}, "bound": None, "steps": 12000},
    "S5": {"task": {"name": "word_problem", "group": "s5"}, "bound": None, "steps": 12000},
}
DELTA: dict[str, Any] = {"type": "delta", "n_heads": 4, "head_dim": 16, "gate": False}
# Mixers of the layers. torch_*: torch.nn's cells with full recurrent matrices; gru and lstm: the project's diagonal ones. With one layer
# on 2-hop, paragru and paralstm have the published 17.0k and 17.1k parameters (16,960 and 17,088); mamba2 (22,604 of 22.7k) and transformer
# (32,128 of 32.2k), whose SwiGLU is as wide as that takes, have them to half a per cent.
MIXERS: dict[str, list[dict[str, Any]]] = {
    "paragru": [{"type": "rnn", "cell": "paragru"}],
    "paralstm": [{"type": "rnn", "cell": "paralstm"}],
    "mamba2": [{"type": "mamba2", "d_state": 64, "expand": 1, "head_dim": 16}],
    "transformer": [{"type": "attention", "n_heads": 4, "d_ff": 77}],
    "torch_gru": [{"dense": "GRU"}],
    "torch_lstm": [{"dense": "LSTM"}],
    "hybrid": [{"type": "rnn", "cell": "paragru"}, {"type": "attention", "n_heads": 4}],
    "gru": [{"type": "rnn", "cell": "gru"}],
    "lstm": [{"type": "rnn", "cell": "lstm"}],
    # so many updates a token, with eigenvalues from -1, or (positive) from 0: negative controls, as neither one reflection nor any number of
    # contractions is a rotation
    "delta_1": [{**DELTA, "updates": 1, "negative": True}],
    "delta_2": [{**DELTA, "updates": 2, "negative": True}],
    "delta_3": [{**DELTA, "updates": 3, "negative": True}],
    "delta_4": [{**DELTA, "updates": 4, "negative": True}],
    "delta_1_positive": [{**DELTA, "updates": 1}],
    "delta_2_positive": [{**DELTA, "updates": 2}],
}
LARGEST_LR = {"delta": 3e-3}  # by type of the first layer
WIDTH, LR, WARMUP, BURST, INIT_STD = 64, 1e-2, 100, 10, 0.125
SPREAD = 1.0  # of the initial recurrent weights of unbounded diagonal LSTM cells: all seeds then learn parity; with 1/sqrt(width) a third
CURRICULUM = 0.6  # of the run at most for sequences of 1/8, 1/4 and 1/2 of the length; 98 % right answers end a stage sooner
# training sequences of each length (published: 10,000); MQAR learns them by heart, and then gets one answer in a hundred wrong
SAMPLES = 40_000
PUBLISHED = {"batch": 16, "steps": 1_875_000, "samples": 10_000, "lr": 5e-4, "curriculum": 0.0}  # 3000 passes; arXiv 2510.21450, appendix C
CHECKED, SCORED = 4096, 10_000  # answers at least that decide whether a cell is solved, and that its final accuracy is taken over
SOLVED = 0.9995
PROMISING = {True: 0.02, False: 0.15}  # nats below which a model is scored while it trains: at the full length, and before
LENGTHS = (0.5, 1, 2, 4, 8)


class Dense(SequenceMixer):
    """torch.nn.GRU or LSTM and an output projection."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rnn = getattr(nn, kind)(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def init_weights(self, std: float, n_layers: int) -> None:
        self.rnn.reset_parameters()
        self.out.reset_parameters()

    def forward(self, x_BTD: Tensor, state: Any = None, segment_ids: Any = None) -> tuple[Tensor, Any]:
        y, after = self.rnn(x_BTD, state)
        return self.out(y), None if state is None else after

    def init_state(self, batch: int, device: Any = None, dtype: Any = None) -> Any:
        zero = torch.zeros(1, batch, WIDTH, device=device, dtype=dtype)
        return (zero, zero.clone()) if self.kind == "LSTM" else zero


def build_model(layers: list[dict[str, Any]], vocabulary: int, bound: float | None) -> LanguageModel:
    """A LanguageModel without MLPs but where a layer asks for one; 'dense' layers are torch.nn's LSTM or GRU inside the same block."""
    mixers: dict[str, dict[str, Any]] = {}
    for i, layer in enumerate(layers):
        mixers[f"m{i}"] = {"type": "attention", "n_heads": 4} if "dense" in layer else {k: v for k, v in layer.items() if k != "d_ff"}
        if layer.get("type") == "rnn":
            if bound is None and layer["cell"] in ("lstm", "paralstm"):
                mixers[f"m{i}"]["recurrent_init"] = SPREAD
            mixers[f"m{i}"] |= {"recurrent_bound": "none"} if bound is None else {"recurrent_bound": "clip", "recurrent_max": bound}
    model = LanguageModel(
        ModelConfig(
            vocab_size=vocabulary,
            d_model=WIDTH,
            n_layers=len(layers),
            pattern=list(mixers),
            mixers=mixers,
            d_ff=max(layer.get("d_ff", 0) for layer in layers),
            learnable_residual=True,
            recompute_head=False,
            init_std=INIT_STD,
        )
    )
    for block, layer in zip(model.blocks, layers):
        if "dense" in layer:
            block.mixer = Dense(layer["dense"])
    return model


def settings_of(task: str, mixer: str, values: dict[str, Any]) -> dict[str, Any]:
    """All that decides a cell's result but its seed and the clock."""
    chosen = TASKS[task]
    layers = MIXERS[mixer] if len(MIXERS[mixer]) > 1 else MIXERS[mixer] * chosen.get("layers", values["layers"])
    return {
        "task": chosen["task"],
        "layers": layers,
        "recurrent_max": chosen["bound"],
        "recurrent_init_unbounded_lstm": SPREAD,
        "width": WIDTH,
        "length": values["length"],
        "batch": values["batch"] * chosen.get("batches", 1),
        "steps": values["steps"] or chosen["steps"],
        "samples": chosen.get("samples", SAMPLES),
        "lr": min(chosen.get("lr", LR), LARGEST_LR.get(layers[0].get("type", ""), 1.0)),
        "init_std": INIT_STD,
        "curriculum": CURRICULUM,
        "warmup": WARMUP,
        "betas": [0.9, 0.999],
        "weight_decay": 1e-6,
        "grad_clip": 1.0,
        **(PUBLISHED if values.get("published") else {}),
    }


@lru_cache(maxsize=32)
def remembered(mapping: str) -> Task:
    """The task of a JSON mapping; its evaluation samples are made once a process, however many cells are scored on them."""
    task = build_task(json.loads(mapping))
    samples: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}
    make = task.sample

    def sample(draws: Draws, T: int) -> tuple[np.ndarray, np.ndarray]:
        key = (T, draws.rows, int(draws.state_R[0]))
        if key not in samples:
            samples[key] = make(draws, T)
        return samples[key]

    task.sample = sample  # type: ignore[method-assign]
    return task


@lru_cache(maxsize=4)
def _pool(mapping: str, n: int, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels) (count, n) int16 of the training streams of `seed`; several mixers train on the same ones."""
    reader, pool = SyntheticReader(build_task(json.loads(mapping)), n, seed), np.empty((2, count, n), np.int16)
    for first in range(0, count, 100_000):  # made as int64
        rows = np.arange(first, min(first + 100_000, count))
        pool[:, rows[0] : rows[-1] + 1] = reader.labelled(rows)[:2]
    return torch.from_numpy(pool[0]), torch.from_numpy(pool[1])


class Cell:
    """One model in training on one task: a step for every length of the curriculum, over samples that lie on the device."""

    def __init__(self, settings: dict[str, Any], seed: int, device: torch.device) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        self.mapping = json.dumps(settings["task"], sort_keys=True)
        self.task = remembered(self.mapping)
        model = build_model(settings["layers"], len(self.task.vocabulary()), settings["recurrent_max"])
        model.init_weights(seed)
        betas = (settings["betas"][0], settings["betas"][1])
        self.trainer = Trainer(
            model, device, lr=settings["lr"], betas=betas, weight_decay=settings["weight_decay"], grad_clip=settings["grad_clip"]
        )
        self.burst_end: Any = None  # of the last burst, an event on the device
        self.steps: dict[int, GraphedStep] = {}
        with self.trainer.here():
            self.loss_sum = torch.zeros((), device=device)

    def step_of(self, n: int) -> GraphedStep:
        """The step on sequences of n tokens, as many as fill the batch; it walks through its samples by itself."""
        if n not in self.steps:
            rows = max(1, self.settings["batch"] * self.settings["length"] // n)
            count = max(rows, self.settings["samples"])
            inputs, labels = (part.to(self.device) for part in _pool(self.mapping, n, self.seed, count))
            place = torch.zeros((), dtype=torch.long, device=self.device)
            ahead = torch.arange(rows, device=self.device)

            def step() -> tuple[Tensor, ...]:
                index = (place + ahead) % count
                place.add_(rows)
                loss, _, _ = self.trainer.update(inputs[index].long(), labels[index].long())
                self.loss_sum.add_(loss)
                return (loss,)

            self.steps[n] = self.trainer.graph(step)
        return self.steps[n]

    def burst(self, n: int, rate: float, count: int) -> None:
        """Hands the device `count` steps on sequences of n tokens; waits for those of the burst before the last."""
        with self.trainer.here():
            step = self.step_of(n)
        for _ in self.trainer.run(step, range(count), lambda _: rate):
            pass
        if self.trainer.stream is not None:
            if self.burst_end is not None:
                self.burst_end.synchronize()
            self.burst_end = self.trainer.stream.record_event()

    def warm(self, n: int) -> None:
        """One step on sequences of n tokens that changes nothing, for the kernels it compiles."""
        self.burst(n, 0.0, 1)
        with self.trainer.here():
            self.trainer.optimizer.state.clear()
            self.loss_sum.zero_()

    def mean_loss(self, steps: int) -> float:
        """Nats per answer over the last `steps` steps; waits for them."""
        with self.trainer.here():
            value = float(self.loss_sum) / steps
            self.loss_sum.zero_()
        return value

    def score(self, lengths: list[int], sequences: int, batch: int) -> dict[str, Any]:
        """Accuracy by length on sequences that no training draws, as evals.measures.tracking reports it."""
        with self.trainer.here():
            return accuracy_by_length(
                self.trainer.model,
                self.task,
                lengths,
                train_length=self.settings["length"],
                sequences=sequences,
                batch=batch,
                seed=self.seed,
            )


def stages_of(task: Task, T: int, curriculum: float = CURRICULUM) -> list[int]:
    """Lengths of the curriculum, the last one T."""
    return [T // share for share in (8, 4, 2) if curriculum and T // share >= max(4, task.min_length())] + [T]


def answers_of(task: Task, T: int) -> int:
    """Answers that a sequence of T tokens asks for, on average."""
    labels = task.sample(Draws(0, "valid", np.arange(64)), T)[1]
    return max(1, int((labels != IGNORE).sum(1).mean()))


def _fall(solved: int) -> int:
    """Steps in which the rate of a cell that was solved at step `solved` falls to nothing; then the cell ends."""
    return max(100, solved // 4)


def _rate(settings: dict[str, Any], step: int, passed: float, solved: int) -> float:
    """The learning rate after `step` steps and the share `passed` of what the cell may take, of steps or time."""
    steps = settings["steps"]
    warmup = min(settings["warmup"], steps // 10)
    factor = lr_factor(step if step < warmup else max(warmup, int(passed * steps)), steps, kind="cosine", warmup=warmup)
    return settings["lr"] * factor * (max(0.0, 1 - (step - solved) / _fall(solved)) if solved else 1.0)


def train_cell(
    settings: dict[str, Any], seed: int, device: torch.device, seconds: float, sequences: int
) -> Generator[None, None, dict[str, Any]]:
    """Trains one model and scores it by length; yields after each burst of steps. The learning rate falls as a cosine of steps or time,
    whichever is further."""
    cell, T, steps = Cell(settings, seed, device), settings["length"], settings["steps"]
    stages, asked = stages_of(cell.task, T, settings["curriculum"]), answers_of(cell.task, T)
    checked = max(256, -(-CHECKED // asked))
    for n in stages:
        cell.warm(n)
        yield
    every = max(BURST, min(100, steps // 10) // BURST * BURST)
    stage, step, solved, ended, since = 0, 0, 0, "steps", 0
    curve: list[list[float | None]] = []
    start = time.perf_counter()
    while step < steps:
        passed = max(step / steps, (time.perf_counter() - start) / seconds)
        if passed >= 1 or solved and step >= solved + _fall(solved):
            ended = "time"
            break
        n = stages[stage]
        cell.burst(n, _rate(settings, step, passed, solved), BURST)
        step, since = step + BURST, since + BURST
        if since >= every and not solved:
            loss, accuracy, since = cell.mean_loss(since), None, 0
            if not np.isfinite(loss):
                ended = "diverged"
                break
            if loss <= PROMISING[n == T]:
                accuracy = cell.score([n], checked, 256)["lengths"][0].get("accuracy")
            curve.append([step, n, loss, accuracy])
            if n == T:
                solved = step if accuracy is not None and accuracy >= SOLVED else 0
            elif (accuracy is not None and accuracy >= 0.98) or passed >= settings["curriculum"] * (stage + 1) / (len(stages) - 1):
                stage += 1
        yield
    trained = time.perf_counter() - start
    lengths = sorted({max(cell.task.min_length(), round(m * T)) for m in LENGTHS})
    result = cell.score(lengths, max(sequences, min(10 * sequences, SCORED // asked)), 250)
    return {
        "parameters": sum(p.numel() for p in cell.trainer.model.parameters()),
        "steps": step,
        "ended": "solved" if solved else ended,
        "seconds": trained,
        "seconds_allowed": seconds,
        "graphed": all(not s.why_not for s in cell.steps.values()),
        "accuracy": result["accuracy"],
        "lengths": result["lengths"],
        "curve": curve,
    }


def finish(cell: Generator[None, None, dict[str, Any]]) -> dict[str, Any]:
    """Runs a cell alone to its end."""
    while True:
        try:
            next(cell)
        except StopIteration as end:
            return end.value
