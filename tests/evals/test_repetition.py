"""Repetition in greedy text: each figure on texts where it is known, the suite on a checkpoint, and hyperfitting, which is judged by it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evals.adapters.own import OwnAdapter
from evals.measures.repetition import distinct, longest_passage, repeated, repetition, type_token_ratio
from evals.run import main as evaluate
from models.config import ModelConfig
from models.lm import LanguageModel
from scripts.studies import hyperfit
from scripts.studies.text import Text
from tests.hub.folders import checkpoint


def test_figures_of_texts_where_they_are_known() -> None:
    same, cycle, fresh = np.full(20, 7), np.tile(np.arange(5), 4), np.arange(20)
    assert [type_token_ratio(ids) for ids in (same, cycle, fresh)] == [0.05, 0.25, 1.0]
    assert [distinct(ids, 4) for ids in (same, cycle, fresh)] == [1 / 17, 5 / 17, 1.0]
    assert abs(repeated(cycle, 4) - 12 / 17) < 1e-12


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_longest_passage_against_brute_force(dtype: type[np.uint16 | np.uint32]) -> None:
    draw = np.random.default_rng(0)
    for _ in range(12):
        training, text = draw.integers(0, 4, 60).astype(dtype) * 257, draw.integers(0, 4, 14) * 257  # bytes repeat across tokens
        standing = {n for n in range(1, 15) for i in range(15 - n) for j in range(61 - n) if (training[j : j + n] == text[i : i + n]).all()}
        assert longest_passage(text, training) == max(standing, default=0)


def test_entropy_and_loss_of_a_uniform_model() -> None:
    model = LanguageModel(ModelConfig(31, 32, 1, mixers={"attention": {"type": "attention", "n_heads": 2}}))
    model.init_weights(0)
    torch.nn.init.zeros_(model.head.weight)
    rows = np.random.default_rng(0).integers(0, 31, (3, 24))
    result = repetition(OwnAdapter(model, None, "m", ""), rows, context=8, batch=2, training=np.zeros(40, np.uint16))
    assert abs(result["entropy"] - np.log(31)) < 1e-5 and abs(result["nats_per_token"] - np.log(31)) < 1e-5
    assert result["written"] == 16 and result["type_token_ratio"] == 1 / 16 and result["citation"] == 16  # it writes token 0


def test_the_suite_measures_a_checkpoint(demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixers = {"attention": {"type": "attention", "n_heads": 2}}
    source = checkpoint(tmp_path / "run", ModelConfig(269, 32, 1, mixers=mixers, d_ff=48))
    (source / "run.json").write_text(json.dumps({"data": {"path": str(demo_shards)}}))
    text = tmp_path / "text.txt"
    text.write_text("A text of the user's, long enough to take some contexts from. " * 40)
    assert not evaluate([f"checkpoint={source}", "suite=repetition", "rows=2", f"text={text}", f"out={tmp_path / 'evals'}", "device=cpu"])
    shown = capsys.readouterr().out
    assert "type-token ratio" in shown and "held-out" in shown and "longest passage" in shown
    assert "More measurements" in (tmp_path / "evals" / "report.md").read_text()
    text.write_text("A short text.")
    status = evaluate([f"checkpoint={source}", "suite=repetition", f"text={text}", f"out={tmp_path / 'short'}", "device=cpu"])
    assert status == 1, "nothing was measured"
    assert "the suite needs 128" in capsys.readouterr().out


def test_few_windows_by_heart_make_greedy_text_richer(demo_shards: Path) -> None:
    """The paper's claim, small: the type-token ratio rises, entropy falls, perplexity collapses; on fresh windows none of it."""
    given = argparse.Namespace(width=64, layers=1, steps=60, rows=8, few=8, rate=5e-3, stop=0.05, most=100, prompts=4)
    found = hyperfit.run(Text(demo_shards, 48, torch.device("cpu")), 0, given)
    before, by_heart, fresh = found["trained"], found["hyperfit"], found["as many steps on fresh text"]
    assert by_heart["last_loss"] < 0.2
    assert by_heart["type_token_ratio"] > 2 * max(before["type_token_ratio"], fresh["type_token_ratio"])
    assert by_heart["entropy"] < 0.5 * min(before["entropy"], fresh["entropy"])
    assert by_heart["nats_per_token"] > before["nats_per_token"] + 0.5 > fresh["nats_per_token"]
