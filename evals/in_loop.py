"""Evaluation inside the training loop: held-out perplexity and a sample of text, at intervals and at the end."""

from __future__ import annotations

import math
from typing import Any

import torch

from data.shards import ShardSet
from evals.adapters import ItemError, OwnAdapter
from evals.baselines import CountBaselines
from evals.perplexity import evaluate, held_out_rows, text_bytes
from evals.position import collapse, position_curve, unlearnt_rows, windows
from evals.texts import Text
from models.generate import generate
from training.config import Config
from training.engine import Engine
from training.files import write_json
from training.metrics import Metrics


def build_evaluator(config: Config, engine: Engine, shards: Any, metrics: Metrics) -> Any:
    """The evaluation that goes with the data: accuracy for generated tasks, perplexity and text for token shards."""
    if config.data.reader != "synthetic":
        return Evaluator(config, engine, shards, metrics)
    from evals.state_tracking import Evaluator as TaskEvaluator

    return TaskEvaluator(config, engine, metrics)


class Evaluator:
    """Scores the held-out split of the first data folder with the model in training, split over the ranks."""

    def __init__(self, config: Config, engine: Engine, shards: list[tuple[ShardSet, float]], metrics: Metrics) -> None:
        self.config, self.engine, self.metrics = config, engine, metrics
        self.train = shards[0][0]
        self.held_out = ShardSet(self.train.directory, "valid")
        self.baselines: dict[str, float] | None = None

    def at(self, step: int) -> None:
        """Runs what is due after optimizer step `step`."""
        if step == self.config.total_steps:
            return  # at_end follows
        if self.config.eval.every and step % self.config.eval.every == 0:
            self.perplexity(step)
        if self.config.eval.sample_every and step % self.config.eval.sample_every == 0:
            self.sample(step)

    def at_end(self, step: int) -> float:
        """The last evaluation, written to eval.json as well; returns held-out bits per byte."""
        result = self.perplexity(step)
        text = self.sample(step)
        if self.engine.world.main:
            write_json(
                self.metrics.run_dir / "eval.json", {"step": step, "perplexity": result, "baselines": self._baselines(), "sample": text}
            )
            rows = {
                "unigram": self._baselines()["unigram"],
                "bigram": self._baselines()["bigram"],
                self.config.name: result["bits_per_byte"],
            }
            self.metrics.say("held-out bits per byte: " + "   ".join(f"{name} {bits:.3f}" for name, bits in rows.items()))
        return result["bits_per_byte"]

    def perplexity(self, step: int) -> dict[str, Any]:
        world, names = self.engine.world, list(self.engine.parameters)
        length = self.config.train.seq_len
        with self.engine.gathered(names):
            part = evaluate(
                self.engine.module,
                self.held_out,
                length=length,
                chunk=length,
                batch=8 if world.sequence == 1 else max(1, min(8, 65536 * world.sequence // length)),
                max_tokens=self.config.eval.tokens,
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
        result = part.to_dict()
        self.metrics.write(step, held_out_loss=part.nats_per_token, perplexity=part.perplexity, bits_per_byte=part.bits_per_byte)
        self.metrics.say(
            f"held out after step {step}: perplexity {part.perplexity:.2f}, {part.bits_per_byte:.4f} bits per byte ({part.tokens:,} tokens)"
        )
        if self.config.eval.long_length:
            result["long"] = self.long(step)
        return result

    def long(self, step: int) -> dict[str, Any]:
        """A position curve of eval.long_length tokens with carried state and no resets, on rank 0 (weights are gathered by all)."""
        settings, result = self.config.eval, {}
        with self.engine.gathered(list(self.engine.parameters)):
            if self.engine.world.main:
                tokens = self.held_out.read(0, self.held_out.n_tokens)
                text = Text(tokens, str(self.held_out.directory), self.held_out.n_bytes / self.held_out.n_tokens)
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
                    asked = "" if reach > settings.long_length else f" (the held-out text reaches no further; {settings.long_length:,} were asked for)"
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
        if self.baselines is None:
            counts, rows = CountBaselines(self.train), held_out_rows(self.held_out, self.config.train.seq_len, self.config.eval.tokens)
            sums = [counts.nll(tokens) for tokens, _ in rows]
            size = sum(text_bytes(self.held_out, tokens[1:]) for tokens, _ in rows)
            self.baselines = {name: sum(s[i] for s in sums) / math.log(2) / size for i, name in enumerate(("unigram", "bigram"))}
        return self.baselines


def _numbers(judged: dict[str, Any]) -> dict[str, float]:
    return {f"long_{key}": float(judged[key]) for key in ("delta_at_end", "delta_largest") if key in judged}
