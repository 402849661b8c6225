"""Evaluation inside the training loop: held-out perplexity and a sample of text, at intervals and at the end."""

from __future__ import annotations

from typing import Any

import torch

from data.files import write_json
from data.shards import ShardSet
from evals.adapters.base import ItemError
from evals.adapters.own import OwnAdapter
from evals.inputs.texts import Text
from evals.measures import mixture
from evals.measures.baselines import CountBaselines
from evals.measures.perplexity import Perplexity, evaluate, held_out_rows, text_bytes
from evals.measures.position import collapse, position_curve, unlearnt_rows, windows
from models.generate import generate
from training.config.schema import Config
from training.engine import Engine
from training.errors import UserError
from training.watch.metrics import Metrics

LONG_TOKENS = 100_000_000  # held-out tokens that position curves are drawn from, which are kept in memory


def build_evaluator(config: Config, engine: Engine, shards: Any, metrics: Metrics) -> Any:
    """The evaluation that goes with the data: accuracy for generated tasks, perplexity and text for token shards."""
    if config.data.reader != "synthetic":
        return Evaluator(config, engine, shards, metrics)
    from evals.state_tracking import Evaluator as TaskEvaluator

    return TaskEvaluator(config, engine, metrics)


class Evaluator:
    """Scores the held-out split of every data folder with the model in training, split over the ranks."""

    def __init__(self, config: Config, engine: Engine, shards: list[tuple[ShardSet, float]], metrics: Metrics) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.train = shards[0][0]
        try:
            self.sources, without = mixture.held_out_sources(shards)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.baselines: dict[str, float] | None = None
        if without:
            what = "this run is not evaluated" if not self.sources else "it is not evaluated"
            metrics.say(f"{', '.join(without)} has no held-out documents, so {what}; prepare the data with valid_fraction above zero.")
        if config.eval.long_length and len(self.sources) > 1:
            metrics.say(f"position curves are those of the held-out text of {self.sources[0].shards.directory} alone.")

    def at(self, step: int) -> None:
        """Runs what is due after optimizer step `step`."""
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
            baselines = self._baselines() if result is not None else None
            write_json(self.metrics.run_dir / "eval.json", {"step": step, "perplexity": result, "baselines": baselines, "sample": text})
            if result is not None and baselines is not None:
                rows = {**baselines, self.config.name: result["bits_per_byte"]}
                self.metrics.say("held-out bits per byte: " + "   ".join(f"{name} {bits:.3f}" for name, bits in rows.items()))
        return None if result is None else result["bits_per_byte"]

    def perplexity(self, step: int) -> dict[str, Any]:
        """Of every source its share of eval.tokens; the total is that of the mixture."""
        with self.engine.gathered(list(self.engine.parameters)):
            parts = [self._score(source) for source in self.sources]
        total = mixture.combined([(part, source.share) for part, source in zip(parts, self.sources)])
        result, named = total.to_dict(), {}
        self.metrics.write(step, held_out_loss=total.nats_per_token, perplexity=total.perplexity, bits_per_byte=total.bits_per_byte)
        text = f"perplexity {total.perplexity:.2f}, {total.bits_per_byte:.4f} bits per byte ({total.tokens:,} tokens)"
        if len(parts) > 1:
            named = {source.name: mixture.figures(part, source.share) for part, source in zip(parts, self.sources)}
            result["sources"] = named
            for name, one in named.items():
                self.metrics.write(step, **{f"held_out_loss/{name}": one["nats_per_token"], f"bits_per_byte/{name}": one["bits_per_byte"]})
            text += f", weighed as in training; {mixture.told(named)}"
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
        """A greedy-ish continuation of eval.sample_prompt on rank 0 (weights are gathered by all)."""
        text = ""
        with self.engine.gathered(list(self.engine.parameters)):
            if self.engine.world.main:
                coder = self.train.coder()
                prompt = torch.tensor([coder.encode(self.config.eval.sample_prompt, start=True)], device=self.engine.world.device)
                module = self.engine.module
                training = module.training
                module.eval()
                ids = generate(module, prompt, self.config.eval.sample_tokens, temperature=0.8, top_k=50, top_p=None, seed=step)
                module.train(training)
                text = coder.decode(ids[0].tolist())
                with (self.metrics.run_dir / "samples.txt").open("a") as file:
                    file.write(f"--- step {step}\n{text}\n")
                self.metrics.say(f"sample after step {step}: {text!r}")
        self.engine.world.barrier()
        return text

    def _baselines(self) -> dict[str, float]:
        """Bits per byte of counts, of each source from its own training tokens."""
        if self.baselines is None:
            parts: list[list[tuple[Perplexity, float]]] = [[], []]
            for source in self.sources:
                counts = CountBaselines(source.train)
                rows = held_out_rows(
                    source.shards, self.config.train.seq_len, source.budget(self.config.eval.tokens, self.config.train.seq_len)
                )
                sums = [counts.nll(tokens) for tokens, _ in rows]
                tokens, size = sum(len(t) - 1 for t, _ in rows), sum(text_bytes(source.shards, t[1:]) for t, _ in rows)
                for i in range(2):
                    parts[i].append((Perplexity(sum(s[i] for s in sums), tokens, size), source.share))
            self.baselines = {name: mixture.combined(part).bits_per_byte for name, part in zip(("unigram", "bigram"), parts)}
        return self.baselines


def _numbers(judged: dict[str, Any]) -> dict[str, float]:
    return {f"long_{key}": float(judged[key]) for key in ("delta_at_end", "delta_largest") if key in judged}
