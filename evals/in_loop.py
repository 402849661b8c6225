"""Evaluation inside the training loop, at intervals and at the end: held-out perplexity and a sample of text, or accuracy on a generated task.

Every rank calls the same methods: results are summed over ranks, and rank 0 writes them (metrics.jsonl, eval.json, samples.txt).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.files import write_json
from data.shards import ShardSet
from data.synthetic import build_task, to_dict
from evals.adapters.base import ItemError
from evals.adapters.own import OwnAdapter
from evals.inputs.texts import Text
from evals.measures import mixture
from evals.measures.baselines import NAMES, baselines
from evals.measures.perplexity import Perplexity, evaluate
from evals.measures.position import collapse, position_curve, unlearnt_rows, windows
from evals.measures.tracking import HEADING, Counts, count, default_lengths, line
from models.generate import generate
from models.prompt import prompt_of
from training.config.schema import Config
from training.engine import Engine
from training.errors import UserError
from training.watch.metrics import Metrics

LONG_TOKENS = 100_000_000  # at most so many held-out tokens are loaded into memory for position curves


def build_evaluator(config: Config, engine: Engine, shards: Any, metrics: Metrics) -> TextEvaluator | TaskEvaluator:
    """The evaluation that goes with the data: accuracy for generated tasks, perplexity and a sample of text for token shards.

    shards: (training split, weight) of every data folder; None for generated tasks. Both kinds have `at(step)` and `at_end(step)`.
    """
    if config.data.reader == "synthetic":
        return TaskEvaluator(config, engine, metrics)
    return TextEvaluator(config, engine, shards, metrics)


class TextEvaluator:
    """Scores the held-out split of every data folder with the model in training; each rank takes its share of the rows."""

    def __init__(self, config: Config, engine: Engine, shards: list[tuple[ShardSet, float]], metrics: Metrics) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.train = shards[0][0]
        self.sources, without = mixture.held_out_sources(shards)
        self.baselines: dict[str, float] | None = None
        if without:
            what = "this run is not evaluated" if not self.sources else "it is not evaluated"
            metrics.say(f"{', '.join(without)} has no held-out documents, so {what}; prepare the data with valid_fraction above zero.")
        if config.eval.long_length and len(self.sources) > 1:
            metrics.say(f"position curves are those of the held-out text of {self.sources[0].shards.directory} alone.")

    def at(self, step: int) -> None:
        """Runs the evaluations that are due after optimizer step `step`."""
        if step == self.config.total_steps:
            return  # at_end follows
        if self.sources and self.config.eval.every and step % self.config.eval.every == 0:
            self.perplexity(step)
        if self.config.eval.sample_every and step % self.config.eval.sample_every == 0:
            self.sample(step)

    def at_end(self, step: int) -> float | None:
        """The last evaluation, written to eval.json as well; returns held-out bits per byte, None where nothing is held out."""
        result = self.perplexity(step) if self.sources else None
        text = self.sample(step)
        if self.engine.world.main:
            counted = self._baselines() if result is not None else None
            told = {"step": step, "perplexity": result, "baselines": counted, "sample": text}
            self.metrics.keep("eval.json", lambda path: write_json(path, told))
            if result is not None and counted is not None:
                rows = {**counted, self.config.name: result["bits_per_byte"]}
                self.metrics.say("held-out bits per byte: " + "   ".join(f"{name} {bits:.3f}" for name, bits in rows.items()))
        return None if result is None else result["bits_per_byte"]

    def perplexity(self, step: int) -> dict[str, Any]:
        """Scores eval.tokens held-out tokens, of every source its share; the total is weighed as in training. Returns what eval.json holds."""
        with self.engine.gathered(list(self.engine.parameters)):
            parts = [self._score(source) for source in self.sources]
        total = mixture.combined([(part, source.share) for part, source in zip(parts, self.sources)])
        result = total.to_dict()
        self.metrics.write(step, held_out_loss=total.nats_per_token, perplexity=total.perplexity, bits_per_byte=total.bits_per_byte)
        text = f"perplexity {total.perplexity:.2f}, {total.bits_per_byte:.4f} bits per byte ({total.tokens:,} tokens)"
        if len(parts) > 1:
            named = {source.name: mixture.figures(part, source.share) for part, source in zip(parts, self.sources)}
            result["sources"] = named
            for name, one in named.items():
                self.metrics.write(step, **{f"held_out_loss/{name}": one["nats_per_token"], f"bits_per_byte/{name}": one["bits_per_byte"]})
            text += f", weighed as in training; {mixture.by_source(named)}"
        self.metrics.say(f"held out after step {step}: {text}")
        if self.config.eval.long_length:
            result["long"] = self.long(step)
        return result

    def _score(self, source: mixture.HeldOut) -> Perplexity:
        """The sums of one source over all ranks."""
        world, length = self.engine.world, self.config.train.seq_len
        part = evaluate(
            self.engine.module,
            source.shards,
            length=length,
            chunk=length,
            batch=8 if world.sequence == 1 else max(1, min(8, 65536 * world.sequence // length)),
            max_tokens=source.budget(self.config.eval.tokens, length),
            rank=world.replica,
            world_size=world.replicas,
            precision=self.config.train.precision,
            slice_of=world.slice_of,
            process_group=world.group,
        )
        lows = [0, *(1 << i for i in range(length.bit_length()))]
        positions = [value for low in lows for value in part.by_position.get(low, (0.0, 0.0))]
        part.nll_nats, tokens, size, *positions = world.sum([part.nll_nats, float(part.tokens), float(part.bytes), *positions])
        part.tokens, part.bytes = int(tokens), int(size)
        part.by_position = {low: positions[2 * i : 2 * i + 2] for i, low in enumerate(lows) if positions[2 * i + 1]}
        return part

    def long(self, step: int) -> dict[str, Any]:
        """A position curve of eval.long_length tokens with carried state and no resets, on rank 0 (weights are gathered by all)."""
        settings, result = self.config.eval, {}
        with self.engine.gathered(list(self.engine.parameters)):
            if self.engine.world.main:
                held_out = self.sources[0].shards
                tokens = held_out.read(0, min(held_out.n_tokens, LONG_TOKENS))
                text = Text(tokens, str(held_out.directory), held_out.n_bytes / held_out.n_tokens)
                model, T = self.engine.module, self.config.train.seq_len
                training = model.training
                adapter = OwnAdapter(model, None, self.config.name, "", self.config.train.precision)
                try:
                    count, reach = text.fitting(settings.long_rows, settings.long_length + 1)
                    rows = text.rows(count, reach, 0)
                    result = position_curve(adapter, rows, chunk=max(T, 512), through=T)
                    same = windows(adapter, rows, T, chunk=max(T, 512)) if reach - 1 > T else None
                    result["collapse"] = collapse(result["buckets"], T, same, unlearnt_rows(same, rows, text.ids, adapter.vocab_size))
                    self.metrics.write(step, long_loss=result["buckets"][-1]["nats_per_token"], **_numbers(result["collapse"]))
                    asked = (
                        ""
                        if reach > settings.long_length
                        else f" (the held-out text reaches no further; {settings.long_length:,} were asked for)"
                    )
                    self.metrics.say(f"position curve to {reach - 1:,} tokens{asked} after step {step}: {result['collapse']['verdict']}")
                except ItemError as error:
                    self.metrics.say(f"position curve after step {step} not measured: {error}")
                model.train(training)
        self.engine.world.barrier()
        return result

    def sample(self, step: int) -> str:
        """A continuation of eval.sample_prompt on rank 0 (weights are gathered by all)."""
        text = ""
        with self.engine.gathered(list(self.engine.parameters)):
            if self.engine.world.main:
                coder = self.train.coder()
                module = self.engine.module
                training = module.training
                module.eval()
                try:
                    prompt = torch.tensor([coder.encode(self.config.eval.sample_prompt, start=True)], device=self.engine.world.device)
                    ids = generate(module, prompt, self.config.eval.sample_tokens, temperature=0.8, top_k=50, top_p=None, seed=step)
                except UserError as error:  # the run itself may well go on
                    self.metrics.say(f"no sample after step {step}: {error}")
                else:
                    text = coder.decode(ids[0].tolist())
                    self.metrics.keep("samples.txt", lambda path: _append(path, f"--- step {step}\n{text}\n"))
                    self.metrics.say(f"sample after step {step}: {text!r}")
                module.train(training)
        self.engine.world.barrier()
        return text

    def _baselines(self) -> dict[str, float]:
        """Bits per byte of counts, of each source from its own training tokens."""
        if self.baselines is None:
            length, tokens, prompt = self.config.train.seq_len, self.config.eval.tokens, prompt_of(self.engine.module)
            by_source = [(baselines(s.train, s.shards, length, s.budget(tokens, length), prompt), s.share) for s in self.sources]
            self.baselines = {n: mixture.combined([(counted[n], share) for counted, share in by_source]).bits_per_byte for n in NAMES}
        return self.baselines


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _numbers(judged: dict[str, Any]) -> dict[str, float]:
    return {f"long_{key}": float(judged[key]) for key in ("delta_at_end", "delta_largest") if key in judged}


class TaskEvaluator:
    """Scores the generated task with the model in training: at the training length every `eval.every` steps, at all lengths at the end."""

    def __init__(self, config: Config, engine: Engine, metrics: Metrics) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.task = build_task(config.data.task)
        self.length = config.train.seq_len

    def at(self, step: int) -> None:
        """Runs the evaluations that are due after optimizer step `step`."""
        every = self.config.eval.every
        if step == self.config.total_steps or not every or step % every:
            return  # at_end follows the last step
        row = self._row(self.length)
        if "error" in row:
            self.metrics.say(f"accuracy after step {step}: {row['error']}")
            return
        self.metrics.write(step, accuracy=row["accuracy"], accuracy_last=row["last"], accuracy_exact=row["exact"])
        self.metrics.say(
            f"accuracy after step {step}: {100 * row['accuracy']:.2f} % of answers, {100 * row['last']:.2f} % of last ones (chance {100 * row['chance']:.2f} %)"
        )

    def at_end(self, step: int) -> float:
        """Accuracy by length, written to eval.json as well; returns the share of wrong answers, 0 to 1, at the training length."""
        lengths = self.config.eval.lengths or default_lengths(self.length, self.task)
        rows = [self._row(n) for n in lengths]
        trained_at = next((r for r in rows if r["length"] == self.length), None) or self._row(self.length)
        if "accuracy" in trained_at:
            self.metrics.write(step, accuracy=trained_at["accuracy"], accuracy_last=trained_at["last"], accuracy_exact=trained_at["exact"])
        self.metrics.say("\n".join([f"accuracy on {to_dict(self.task)}", HEADING, *map(line, rows)]))
        if self.engine.world.main:
            result = {"task": to_dict(self.task), "train_length": self.length, "accuracy": trained_at.get("accuracy"), "lengths": rows}
            self.metrics.keep("eval.json", lambda path: write_json(path, {"step": step, "state_tracking": result}))
        return 1.0 - trained_at.get("accuracy", 0.0)

    def _row(self, length: int) -> dict[str, Any]:
        """The counts of all ranks at `length` tokens as a row of the result, or its error."""
        world, sequences = self.engine.world, max(1, self.config.eval.tokens // length)
        problem, counts = "", Counts(labels=[0] * len(self.task.vocabulary()))
        with self.engine.gathered(list(self.engine.parameters)):
            try:
                counts = count(
                    self.engine.module,
                    self.task,
                    length,
                    sequences=sequences,
                    seed=self.config.seed,
                    batch=min(64, -(-sequences // world.size)),
                    precision=self.config.train.precision,
                    rank=world.rank,
                    world_size=world.size,
                )
            except (UserError, torch.OutOfMemoryError) as error:
                problem = str(error).splitlines()[0]
        if world.any(bool(problem)):
            return {"length": length, "error": problem or "Another rank could not score this length."}
        return Counts.from_flat(world.sum(counts.flat())).to_dict(length)
