"""Where a run stands in its data: samples and tokens seen, carried in the state of every checkpoint, and the order that the samples are read in.

A sample's number means something only in one order: sequence length, reader, seed and (for streams) rows are those the run began with, whatever
its command says later. The batch and the weights of a mixture may change at any checkpoint: the next sample is the one after the last.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from data.order import Mixture
from training.config.schema import Config, Position
from training.errors import UserError

Stretches = list[tuple[int, list[float]]]


@dataclass
class Order:
    """What the numbers of samples stand for. stretches: (first sample, weights of the sources), see data.order.Blend."""

    seq_len: int
    reader: str
    seed: int
    rows: int
    stretches: Stretches


@dataclass
class Cursor:
    """Optimizer steps, samples and tokens behind a run. first: step, sample and tokens at which its own began, where it was forked from another."""

    order: Order
    step: int = 0
    samples: int = 0
    tokens: int = 0
    first_step: int = 0
    first_tokens: int = 0
    origin: str = ""
    notes: list[str] = field(default_factory=list)

    def advance(self, config: Config) -> None:
        """One more optimizer step."""
        self.step += 1
        self.samples += config.train.global_batch
        self.tokens += config.tokens_per_step

    def position(self) -> Position:
        return Position(self.step, self.tokens, self.first_step, self.first_tokens)

    def state(self) -> dict[str, Any]:
        """For state.json; `read` takes it back."""
        first = {"step": self.first_step, "tokens": self.first_tokens, "from": self.origin}
        return {"step": self.step, "samples": self.samples, "tokens": self.tokens, "first": first, "order": dataclasses.asdict(self.order)}


def begin(config: Config, weights: list[float]) -> Cursor:
    """The cursor of a run that starts with sample 0."""
    t = config.train
    return Cursor(Order(t.seq_len, config.data.reader, config.seed, t.global_batch, [(0, weights)]))


def read(state: dict[str, Any], run: dict[str, Any], config: Config) -> Cursor:
    """The cursor in a checkpoint's state; one from before cursors were kept is step x the batch that its run.json names (`config`'s without it)."""
    t, data = run.get("train") or {}, run.get("data") or {}
    if "order" in state:
        order = Order(**{**state["order"], "stretches": [(first, weights) for first, weights in state["order"]["stretches"]]})
        first = state["first"]
        return Cursor(order, state["step"], state["samples"], state["tokens"], first["step"], first["tokens"], first["from"])
    path, batch, seq_len = data.get("path"), t.get("global_batch", config.train.global_batch), t.get("seq_len", config.train.seq_len)
    weights = [float(w) for w in path.values()] if isinstance(path, dict) else [1.0]
    order = Order(seq_len, data.get("reader", config.data.reader), run.get("seed", config.seed), batch, [(0, weights)])
    return Cursor(order, state["step"], state["step"] * batch, state["step"] * batch * seq_len)


def _same(a: list[float], b: list[float]) -> bool:
    first, second = Mixture(a, 0), Mixture(b, 0)
    return first.block == second.block and first.quota.tolist() == second.quota.tolist()


def take_on(cursor: Cursor, config: Config, weights: list[float], where: str) -> None:
    """Makes `cursor` go on under the settings of `config`, with a note for what that changes in the data. Raises UserError for what cannot be
    gone on with: that is a new run, which train.start_from begins. where: the checkpoint."""
    order, t = cursor.order, config.train
    fork = f"begin a new run from it: train.start_from={where} run_dir=NEW_FOLDER."
    if t.seq_len != order.seq_len:
        raise UserError(
            f"{where} is of a run on sequences of {order.seq_len:,} tokens, and train.seq_len={t.seq_len:,} would read its data anew; {fork}"
        )
    if config.data.reader != order.reader:
        raise UserError(f"{where} is of a run with data.reader={order.reader}, and {config.data.reader} would read its data anew; {fork}")
    if order.reader == "stream" and t.global_batch != order.rows:
        if t.initial_state == "pass":
            raise UserError(
                f"{where} carries the states of {order.rows} streams, which train.global_batch={t.global_batch} does not have; {fork}"
            )
        cursor.notes.append(f"the data stay cut into {order.rows} streams")
    if config.seed != order.seed:
        cursor.notes.append(f"the order of the data stays that of seed {order.seed}")
    if order.reader == "windows" and not _same(weights, order.stretches[-1][1]):
        order.stretches = [stretch for stretch in order.stretches if stretch[0] < cursor.samples] + [(cursor.samples, weights)]
        cursor.notes.append(f"from sample {cursor.samples:,} on the sources have the weights {', '.join(f'{w:g}' for w in weights)}")
