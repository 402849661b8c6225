"""The harness adapter: scores against plain loops, and a task over a local file where lm_eval is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.adapters import Adapter, ItemError
from evals.harness import make_lm, run_task, score_pairs, split_pair
from tests.evals.conftest import VOCABULARY


@pytest.mark.parametrize("name", ["llama", "mamba2", "own"])
def test_scores_equal_a_plain_loop(adapters: dict[str, Adapter], name: str) -> None:
    adapter, rng = adapters[name], np.random.default_rng(0)
    pairs = [
        (rng.integers(1, VOCABULARY, int(a)).tolist(), rng.integers(1, VOCABULARY, int(b)).tolist()) for a, b in rng.integers(1, 9, (30, 2))
    ]
    for i in range(0, 30, 3):  # some that greedy decoding does write
        pairs[i] = (pairs[i][0], adapter.greedy(torch.tensor([pairs[i][0]]), len(pairs[i][1]), 4)[0].tolist())
    found = score_pairs(adapter, pairs, 4, 3)
    for (context, continuation), (nats, exact) in zip(pairs, found):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = adapter.model(ids).logits[0, len(context) - 1 : -1].double()
        assert nats == pytest.approx(float(logits.log_softmax(-1).gather(1, ids[0, len(context) :, None]).sum()), rel=1e-4)
        assert exact == (logits.argmax(-1).tolist() == continuation)
    assert sum(exact for _, exact in found) >= 10
    with pytest.raises(ItemError, match="empty context"):
        score_pairs(adapter, [([], [1])], 4, 1)


def test_spaces_belong_to_the_continuation() -> None:
    encode = lambda text: [ord(c) for c in text]  # noqa: E731
    assert split_pair(encode, "a b ", "c") == (encode("a b"), encode(" c"))


def test_without_the_harness_there_is_a_sentence(adapters: dict[str, Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ItemError, match="not installed"):
        make_lm(adapters["own"], 16, 2)


def test_a_task_over_a_local_file(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": f"The number after {i} is", "a": str(i + 1)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task: dict[str, Any] = {
        "task": "local_numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": " {{a}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity", "higher_is_better": False}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    adapter = adapters["own"]
    found = run_task(adapter, str(tmp_path / "task.yaml"), chunk=16, batch=2, limit=4, seed=0)
    coder = adapter.need_coder()
    pairs = [([*coder.start_ids, *coder.encode(r["q"])], coder.encode(f" {r['a']}")) for r in rows[:4]]
    nats = [n for n, _ in score_pairs(adapter, pairs, 16, 2)]
    assert found["figures"]["perplexity,none"] == pytest.approx(float(np.exp(-np.mean(nats))), rel=1e-4) and found["samples"] == 4
    with pytest.raises(ItemError, match="cannot be read"):
        run_task(adapter, str(tmp_path / "none.yaml"), chunk=16, batch=2, limit=4, seed=0)
    with pytest.raises(ItemError, match="lambada_openai"):
        run_task(adapter, "lambada_openai", chunk=16, batch=2, limit=4, seed=0)
