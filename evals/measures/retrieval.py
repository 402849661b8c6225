"""Scores retrieval tasks: a length x depth grid of accuracies with Wilson intervals, by one teacher-forced pass or by greedy decoding; beside
them what a guess and programs that only copy would score on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data.tokenizer import TextCoder
from evals.adapters.base import Adapter
from evals.inputs.tasks import Sample, Task
from evals.inputs.texts import Text
from evals.measures.statistics import wilson


def score(adapter: Adapter, task: Task, samples: list[Sample], chunk: int, batch: int, greedy: bool = False) -> list[float]:
    """A score in [0, 1] for each sample: exact match for tasks with one answer, recall of the answers for lists.

    greedy: also decode tasks with one answer, and look for the answer's text in what is written, as published; by default they are scored
    by whether every token of the answer is the argmax, which is what greedy decoding would have written.
    """
    coder, scores = adapter.need_coder(), []
    for a in range(0, len(samples), batch):
        group = samples[a : a + batch]
        prompt = torch.tensor([s.prompt for s in group])
        if task.by_ids and not greedy:
            longest = max(len(s.answer) for s in group)
            answers = torch.tensor([s.answer + [-100] * (longest - len(s.answer)) for s in group])
            scores += adapter.hits(prompt, answers, chunk).float().tolist()
            continue
        written = adapter.greedy(prompt, max(s.new_tokens for s in group), chunk)
        scores += [recall(coder, sample, ids) for sample, ids in zip(group, written.tolist())]
    return scores


def recall(coder: TextCoder, sample: Sample, ids: list[int]) -> float:
    """Share, 0 to 1, of the sample's answers that stand in the text of `ids`, upper and lower case alike."""
    text = coder.decode(ids).lower()
    return sum(answer.lower() in text for answer in sample.answers) / len(sample.answers)


def without_reading(coder: TextCoder, task: Task, samples: list[Sample]) -> dict[str, float]:
    """Mean score, 0 to 1, on the samples of a guess ('chance') and of each program that only copies (Sample.copies), by name.

    Where the text holds several keys, also of naming any of them.
    """
    rng, by_sample = np.random.default_rng(0), [{"chance": s.chance} for s in samples]
    for sample, scores in zip(samples, by_sample):
        for name, ids in sample.copies(rng).items():
            scores[name] = float(ids == sample.answer) if task.by_ids else recall(coder, sample, ids)
        if task.keys_in_text > 1:
            scores["names any key"] = 1 / task.keys_in_text
    return {name: sum(scores[name] for scores in by_sample) / len(by_sample) for name in by_sample[0]}


def grid(
    adapter: Adapter,
    task: Task,
    length: int,
    depths: list[float],
    samples: int,
    *,
    seed: int = 0,
    chunk: int = 2048,
    batch: int = 8,
    text: Text | None = None,
    greedy: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Accuracies of one task at prompts of `length` tokens, a cell for each depth (0 to 1), with 95 % intervals.

    samples: prompts at each depth (of tasks without a depth: in all); text: where prose is taken from; greedy: see `score`. Raises ItemError
    where a prompt does not fit, there is no tokenizer, or logits are not finite.
    """
    coder = adapter.need_coder()
    cells: list[dict[str, Any]] = []
    everything: list[Sample] = []
    depths = depths if task.has_depth else [0.5]
    for i, depth in enumerate(depths):
        prompts = [task.sample(coder, length, depth, n, seed, text) for n in range(samples)]
        everything += prompts
        longest = max(len(s.prompt) + len(s.answer) for s in prompts)
        adapter.check_length(longest)
        values = score(adapter, task, prompts, chunk, batch, greedy)
        low, high = wilson(round(sum(values)), len(values))
        cells.append(
            {"depth": depth, "accuracy": sum(values) / len(values), "n": len(values), "low": low, "high": high, "prompt_tokens": longest}
        )
        if on_progress:
            on_progress(i + 1, len(depths))
    total = float(sum(c["accuracy"] * c["n"] for c in cells))
    n = sum(int(c["n"]) for c in cells)
    low, high = wilson(round(total), n)
    result = {"task": task.label, "length": length, "cells": cells, "accuracy": total / n, "n": n, "low": low, "high": high, "seed": seed}
    return {**result, "without_reading": without_reading(coder, task, everything)}
