"""One cell of the table of scripts/studies/equal.py: a mixer of about 33,000 parameters learns one task, along a ladder of lengths.

A batch is always B rows of T tokens; of a shorter length n a row holds T // n samples, each a segment of its own. So one CUDA graph serves all lengths of
the ladder. A rung is left when the mean loss says that nearly all answers are right, or when its share of the steps is over. When a pool of
samples was read a few times, the next ones are drawn (data/synthetic). A cell ends when it is solved, after a short fall of the learning
rate, or after its steps; cut at any burst, it goes on from `state()`, weights, moments and place.

Legend: B rows of a batch, T length, n length of a rung, V tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.synthetic import build_task
from data.synthetic.source import SyntheticReader
from data.synthetic.task import IGNORE, Draws
from scripts.studies.cells import build_model
from scripts.studies.trainer import Trainer

# steps: at most; mixers that cannot learn a task take twice those of the slowest that did. first: shortest length; grow: from one rung to the next.
# dense: of mixers with dense cells; on words of a group a convolution of four tokens answers the shortest words by itself, which delays what is to be
# learnt, and without the output gate S4 takes three quarters of the steps.
GROUP: dict[str, Any] = {"bound": None, "first": 2, "grow": 1.4, "dense": {"d_conv": 0, "gate": False}}
# Of large groups: a rate that falls with the root of the length, rungs that are left at 0.2 nats and never by the clock (scripts/studies/delta_table.py
# learnt A5 and S5 so), and a rate that falls as one over the steps at a length from 400 of them on: at words of 42 a GRU hovered for 1,800 steps without.
# MQAR has that at the longest length alone, where a GRU stood between 98 and 99.4 % for 3,000 steps.
LARGE: dict[str, Any] = {**GROUP, "falls": True, "climbed": 0.2, "eases": 400, "curriculum": 0.0}
TASKS: dict[str, dict[str, Any]] = {
    "parity": {**GROUP, "task": {"name": "parity"}, "steps": 3000},
    "mod-5": {**GROUP, "task": {"name": "modular_arithmetic", "modulus": 5}, "steps": 5000, "first": 3},
    "S3": {**GROUP, "task": {"name": "word_problem", "group": "s3"}, "steps": 4000},
    "S4": {**LARGE, "task": {"name": "word_problem", "group": "s4"}, "steps": 8000},
    "A5": {**LARGE, "task": {"name": "word_problem", "group": "a5"}, "steps": 20_000},
    "S5": {**LARGE, "task": {"name": "word_problem", "group": "s5"}, "steps": 12_000},
    "2-hop": {"task": {"name": "khop", "hops": 2, "symbols": 5}, "bound": 0.9, "steps": 6000, "first": 16, "grow": 2.0},
    "mqar": {"task": {"name": "mqar", "pairs": 2, "symbols": 128}, "bound": 0.9, "steps": 8000, "first": 8, "grow": 2.0, "settles": 400},
}
RNN: dict[str, Any] = {"type": "rnn"}
DELTA: dict[str, Any] = {"type": "delta", "head_dim": 16}
# Models with 31,000 to 35,000 parameters each (S3), the fewest that dense heads of 64 channels take: others are made as wide as that allows.
MIXERS: dict[str, dict[str, Any]] = {
    "dense_gru": {**RNN, "cell": "dense_gru", "n_heads": 2},
    "dense_lstm": {**RNN, "cell": "dense_lstm"},
    "slstm": {**RNN, "cell": "slstm"},
    "m2rnn": {"type": "m2rnn", "n_heads": 6, "head_dim": 16},
    "m2rnn_tracker": {"type": "m2rnn", "n_heads": 2, "head_dim": 1, "expand_v": 64.0, "start": "tracker"},
    "paragru": {**RNN, "cell": "paragru", "expand": 1.75},
    "paralstm": {**RNN, "cell": "paralstm", "expand": 1.75},
    "mamba2": {"type": "mamba2", "d_state": 48, "expand": 2, "head_dim": 16},
    "gated_deltanet": {**DELTA, "n_heads": 6},
    "gated_deltanet_2": {**DELTA, "n_heads": 6, "negative": True},
    "deltaproduct_2": {**DELTA, "n_heads": 4, "updates": 2, "negative": True, "gate": False},
    "deltaproduct_4": {**DELTA, "n_heads": 3, "updates": 4, "negative": True, "gate": False, "output_gate": False},
    "transformer": {"type": "attention", "n_heads": 4, "d_ff": 77},
}
DENSE = {"dense_gru": 1, "dense_lstm": 2, "slstm": 2}  # blocks of the input projection where there is no output gate
RATES = {"m2rnn": 5e-3}  # by type of the mixer, else RATE
RATE, WARMUP, DECAY, INIT_STD, BURST, EVERY = 1e-2, 50, 1e-6, 0.125, 10, 20
CURRICULUM = 0.6  # of the steps, by which the ladder is climbed at the latest; 0: a rung that is not learnt is not left
CLIMBED, PROMISING, SOLVED = 0.05, 0.01, 0.999  # nats that end a rung; nats from which on the last one is scored; accuracy that solves it
POOL, PASSES = 16384, 6  # rows drawn at a time, and how often they are read, each time in another order
LENGTHS, SCORED, CHECKED = (1, 2, 4, 8), 512, 256  # times the training length; sequences scored in the end, and on the way


def settings_of(task: str, mixer: str, values: dict[str, Any]) -> dict[str, Any]:
    """All that decides a cell's result but its seed and how far it came."""
    chosen, layer = TASKS[task], MIXERS[mixer]
    if mixer in DENSE:
        layer = {**layer, **chosen["dense"], "n_heads": DENSE[mixer]} if "dense" in chosen else layer
    return {
        "task": chosen["task"], "layer": layer, "bound": chosen["bound"], "first": chosen["first"], "grow": chosen["grow"],
        "length": values["length"], "batch": values["batch"], "lr": RATES.get(layer["type"], RATE), "warmup": WARMUP, "weight_decay": DECAY,
        "betas": [0.9, 0.99], "grad_clip": 1.0, "init_std": INIT_STD, "curriculum": CURRICULUM,
        **{key: chosen[key] for key in ("falls", "climbed", "eases", "settles", "curriculum") if key in chosen},
    }  # fmt: skip


def variant(task: str, mixer: str) -> str:
    """Names what of a mixer's kernels this task needs: tasks of recall bound the weights of diagonal cells and keep the convolution of dense ones."""
    return mixer if TASKS[task]["bound"] is None else f"{mixer} bounded"


def ladder(first: int, grow: float, least: int, T: int) -> list[int]:
    """Lengths, the last one T."""
    rungs, n = [], max(first, least)
    while n < T:
        rungs.append(n)
        n = max(n + 1, int(n * grow))
    return [*rungs, T]


@lru_cache(maxsize=256)
def drawn(mapping: str, n: int, T: int, seed: int, fill: int, rows: int) -> tuple[Tensor, Tensor]:
    """(inputs, labels) (rows, T) int16: the training samples of number `fill` of a rung; several mixers read the same ones."""
    reader, pieces = SyntheticReader(build_task(json.loads(mapping)), n, seed), T // n
    first = fill * rows * pieces
    out = np.zeros((2, rows, T), np.int16)
    out[1] = IGNORE
    for part, values in zip(out, reader.labelled(np.arange(first, first + rows * pieces))[:2]):
        part[:, : pieces * n] = values.reshape(rows, pieces * n)
    return torch.from_numpy(out[0]), torch.from_numpy(out[1])


@lru_cache(maxsize=64)
def held_out(mapping: str, n: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(inputs, labels) (rows, n) that no training draws."""
    inputs, labels = build_task(json.loads(mapping)).sample(Draws(0, "valid", np.arange(rows)), n)
    on_device = torch.from_numpy(inputs).to(device), torch.from_numpy(labels).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams read it too
    return on_device


@dataclass
class Progress:
    """Where a cell is: steps taken, its rung, the steps it may take, the step at which it was solved (0: not yet), pools drawn for the rung, the step at
    which it came to this rung, and the curve of (step, length, loss, accuracy or None)."""

    limit: int
    step: int = 0
    rung: int = 0
    solved: int = 0
    fill: int = 0
    arrived: int = 0
    seconds: float = 0.0
    curve: list[list[float | None]] = field(default_factory=list)


class Learner:
    """A cell in training. `burst` takes a few steps, `look` settles what follows; `ended` says why it is over, or is empty."""

    def __init__(self, settings: dict[str, Any], seed: int, device: torch.device, limit: int) -> None:
        self.settings, self.seed, self.device = settings, seed, device
        self.mapping, self.T, self.B = json.dumps(settings["task"], sort_keys=True), settings["length"], settings["batch"]
        task = build_task(settings["task"])
        self.rungs = ladder(settings["first"], settings["grow"], task.min_length(), self.T)
        model = build_model([settings["layer"]], len(task.vocabulary()), settings["bound"])
        model.init_weights(seed)
        self.trainer = Trainer(
            model, device, lr=settings["lr"], betas=tuple(settings["betas"]), weight_decay=settings["weight_decay"], grad_clip=settings["grad_clip"],
        )  # fmt: skip
        self.rows = max(self.B, POOL if device.type == "cuda" else 2048) // self.B * self.B
        self.progress, self.ended, self.pending = Progress(limit), "", 0
        self.burst_end: Any = None
        with self.trainer.here():
            self.inputs, self.labels = (torch.zeros(self.rows, self.T, dtype=torch.int16, device=device) for _ in range(2))
            self.segments = torch.zeros(self.B, self.T, dtype=torch.int32, device=device)
            self.place, self.ahead = torch.zeros((), dtype=torch.long, device=device), torch.arange(self.B, device=device)
            self.order = torch.zeros(PASSES * self.rows, dtype=torch.long, device=device)
            self.loss_sum = torch.zeros((), device=device)
        self.step = self.trainer.graph(self._step)
        self._fill()

    @property
    def n(self) -> int:
        return self.rungs[self.progress.rung]

    def _fill(self) -> None:
        """The next samples of this rung, read from the first one on."""
        with self.trainer.here():
            for held, new in zip((self.inputs, self.labels), drawn(self.mapping, self.n, self.T, self.seed, self.progress.fill, self.rows)):
                held.copy_(new)
            self.segments.copy_((torch.arange(self.T) // self.n).to(torch.int32).expand(self.B, -1))
            draw = torch.Generator().manual_seed(self.seed)
            self.order.copy_(torch.cat([torch.randperm(self.rows, generator=draw) for _ in range(PASSES)]))
            self.place.zero_()
        self.progress.fill, self.read = self.progress.fill + 1, 0

    def _step(self) -> tuple[Tensor, ...]:
        index = self.order[self.place + self.ahead]
        self.place.add_(self.B)
        loss, _, _ = self.trainer.update(self.inputs[index].long(), self.labels[index].long(), segment_ids=self.segments)
        self.loss_sum.add_(loss)
        return (loss,)

    def warm(self) -> None:
        """A step of rate zero, and a look at the longest words, for the kernels that they compile."""
        for _ in self.trainer.run(self.step, range(1), lambda _: 0.0):
            pass
        with self.trainer.here():
            self.trainer.optimizer.state.clear()
            self.place.zero_()
            self.loss_sum.zero_()
        self.score(self.T, self.B)

    def rate(self) -> float:
        p, s = self.progress, self.settings
        fall = max(0.0, 1 - (p.step - p.solved) / self.fall) if p.solved else 1.0
        now = p.solved or p.step  # what follows is held from then on, so that the rate falls from where it was
        late = min(1.0, max(0.05, (p.limit - now) / (0.2 * p.limit)))  # the last fifth of all steps
        # one that hovers below what solves it, or ends its rung, is taken there by smaller steps: at every length, or at the longest alone
        full = s.get("eases") or (s.get("settles") if p.arrived and self.last else None)
        if full:
            late *= min(1.0, full / max(1, now - p.arrived))
        long = min(1.0, (8 / self.n) ** 0.5) if s.get("falls") else 1.0  # at a rate of 1e-2 S4 was lost again at lengths of 42 to 64
        return s["lr"] * long * min(1.0, (p.step + 1) / s["warmup"]) * late * fall

    @property
    def last(self) -> bool:
        """Whether this is the longest length."""
        return self.progress.rung == len(self.rungs) - 1

    @property
    def fall(self) -> int:
        """Steps over which the rate of a solved cell falls to nothing."""
        return max(100, self.progress.solved // 4) // BURST * BURST

    @property
    def leaves(self) -> float:
        """The step at which its rung is left, learnt or not."""
        share = self.settings["curriculum"] * (self.progress.rung + 1) / max(1, len(self.rungs) - 1)
        return share * self.progress.limit if share else math.inf

    def burst(self, steps: int = BURST) -> None:
        """Hands the device some steps; waits for those of the burst before the last."""
        p = self.progress
        if self.read + steps * self.B > PASSES * self.rows:
            self._fill()
        for _ in self.trainer.run(self.step, range(steps), lambda _: self.rate()):
            pass
        p.step, self.pending, self.read = p.step + steps, self.pending + steps, self.read + steps * self.B
        if self.trainer.stream is not None:
            if self.burst_end is not None:
                self.burst_end.synchronize()
            self.burst_end = self.trainer.stream.record_event()

    def look(self) -> None:
        """Climbs, ends or goes on, by what was learnt since the last look."""
        p, s = self.progress, self.settings
        if p.solved and p.step >= p.solved + self.fall:
            self.ended = "solved"
        if self.pending < EVERY or p.solved or self.ended:
            return
        with self.trainer.here():
            loss = float(self.loss_sum) / self.pending
            self.loss_sum.zero_()
        self.pending, accuracy = 0, None
        if not np.isfinite(loss):
            self.ended = "diverged"
            return
        if self.last and loss <= s.get("promising", PROMISING):
            accuracy = self.score(self.T, CHECKED)["accuracy"]
        if p.step % (EVERY * 5) == 0 or accuracy is not None:
            p.curve.append([p.step, self.n, loss, accuracy])
        if accuracy is not None and accuracy >= s.get("solved", SOLVED):
            p.solved = p.step
        elif p.step >= p.limit:
            self.ended = "steps"
        elif not self.last and (loss <= s.get("climbed", CLIMBED) or p.step >= self.leaves):
            p.rung, p.fill, p.arrived = p.rung + 1, 0, p.step
            p.curve.append([p.step, self.n, loss, None])
            self._fill()

    @torch.no_grad()
    def score(self, n: int, rows: int) -> dict[str, float]:
        """Accuracy over all answers of held-out words of n tokens, of the last answers, and of always saying the commonest."""
        right = asked = last = 0
        model = self.trainer.model.eval()
        with self.trainer.here():
            inputs, labels = held_out(self.mapping, n, rows, self.device)
            for ids, wanted in zip(inputs.split(self.B), labels.split(self.B)):
                hit, there = model(ids).logits.argmax(-1) == wanted, wanted != IGNORE
                right, asked = right + hit.sum(), asked + there.sum()
                place = n - 1 - there.flip(1).int().argmax(1)
                last = last + hit.gather(1, place[:, None]).sum()
            common = torch.bincount(labels[labels != IGNORE]).max()
            values = [float(v) for v in (right / asked, last / rows, common / asked)]
        model.train()
        return {"length": n, **dict(zip(("accuracy", "last", "chance"), values))}

    def result(self) -> dict[str, Any]:
        lengths = [self.score(n, SCORED) for n in sorted(m * self.T for m in LENGTHS)]
        return {
            "parameters": sum(p.numel() for p in self.trainer.model.parameters()), "ended": self.ended or "time", **asdict(self.progress),
            "graphed": not self.step.why_not, "accuracy": lengths[0]["accuracy"], "lengths": lengths,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What it goes on from; moments in bf16, as there may be many cells. All of it is there when this returns, for whoever saves it reads it on
        another stream."""
        with self.trainer.here():
            moments = {
                number: {name: v.bfloat16() if v.ndim else v for name, v in held.items()}
                for number, held in self.trainer.optimizer.state_dict()["state"].items()
            }
            state = {"model": self.trainer.model.state_dict(), "moments": moments, "progress": asdict(self.progress), "waited": True}
        if self.trainer.stream is not None:
            self.trainer.stream.synchronize()
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`. Moments that were saved before they were there (states without `waited`) are left out and begin anew."""
        with self.trainer.here():
            self.trainer.model.load_state_dict(state["model"])
            groups = [group["params"] for group in self.trainer.optimizer.param_groups] if state.get("waited") else []
            for number, parameter in enumerate(p for group in groups for p in group):
                held = {name: v.to(self.device, torch.float32) for name, v in state["moments"][number].items()}
                self.trainer.optimizer.state[parameter] = held
        limit = self.progress.limit
        self.progress = Progress(**state["progress"])
        self.progress.limit = max(limit, self.progress.limit)
        self._fill()
