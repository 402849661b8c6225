"""Scores retrieval tasks: a length x depth grid of accuracies with Wilson intervals, by one teacher-forced pass or by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from evals.adapters import Adapter
from evals.statistics import wilson
from evals.tasks import Sample, Task
from evals.texts import Text


def score(adapter: Adapter, task: Task, samples: list[Sample], chunk: int, batch: int, greedy: bool = False) -> list[float]:
    """A score in [0, 1] for each sample: exact match for tasks with one answer, recall of the answers for lists.

    greedy: also decode tasks with one answer, and look for the answer's text in what is written, as published; by default they are scored
    by whether every token of the answer is the argmax, which is what greedy decoding would have written.
    """
    coder, found = adapter.need_coder(), []
    for a in range(0, len(samples), batch):
        group = samples[a : a + batch]
        prompt = torch.tensor([s.prompt for s in group])
        if task.by_ids and not greedy:
            longest = max(len(s.answer) for s in group)
            answers = torch.tensor([s.answer + [-100] * (longest - len(s.answer)) for s in group])
            found += adapter.hits(prompt, answers, chunk).float().tolist()
            continue
        written = adapter.greedy(prompt, max(s.new_tokens for s in group), chunk)
        for sample, ids in zip(group, written.tolist()):
            text = coder.decode(ids).lower()
            found.append(sum(answer.lower() in text for answer in sample.answers) / len(sample.answers))
    return found


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
    """One length of the grid: `samples` prompts at each depth (tasks without a depth: that many in all)."""
    coder = adapter.need_coder()
    cells: list[dict[str, Any]] = []
    depths = depths if task.has_depth else [0.5]
    for i, depth in enumerate(depths):
        made = [task.sample(coder, length, depth, n, seed, text) for n in range(samples)]
        longest = max(len(s.prompt) + len(s.answer) for s in made)
        adapter.check_length(longest)
        values = score(adapter, task, made, chunk, batch, greedy)
        low, high = wilson(round(sum(values)), len(values))
        cells.append(
            {"depth": depth, "accuracy": sum(values) / len(values), "n": len(values), "low": low, "high": high, "prompt_tokens": longest}
        )
        if on_progress:
            on_progress(i + 1, len(depths))
    total = float(sum(c["accuracy"] * c["n"] for c in cells))
    n = sum(int(c["n"]) for c in cells)
    low, high = wilson(round(total), n)
    return {"task": task.label, "length": length, "cells": cells, "accuracy": total / n, "n": n, "low": low, "high": high, "seed": seed}
