"""The model card says what the checkpoint, the log and the evaluations hold, and nothing where they hold nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from evals.report.card import evaluation
from models.hub.export import write_folder
from tests.hub.folders import checkpoint
from tests.hub.test_native_export import FAMILIES


def test_the_card_holds_training_evaluation_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, out = tmp_path / "run", tmp_path / "hf"
    source = checkpoint(run / "checkpoints" / "step-30", FAMILIES["llama"])
    facts = {
        "run": {
            "name": "mine",
            "seed": 7,
            "data": {"path": {"shards/books": 0.3, "web": 0.7}},
            "train": {"seq_len": 512, "global_batch": 32},
            "optim": {"lr": 0.003},
        },
        "state": {"tokens": 491520, "step": 30},
    }
    for name, value in facts.items():
        (source / f"{name}.json").write_text(json.dumps(value))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 5 / s}) + "\n" for s in range(1, 31)))
    curve = [{"from": a, "to": 2 * a, "nats_per_token": 3 - 0.1 * a, "tokens": 9} for a in (1, 2, 4)]
    held_out = {"bits_per_byte": 1.2345, "perplexity": 9.75, "by_position": curve}
    (run / "eval.json").write_text(json.dumps({"step": 30, "perplexity": held_out, "baselines": {"bigram": 3.4567}}))
    item = {"kind": "position", "status": "done", "item": "position", "model": {}, "environment": {}}
    (tmp_path / "evals" / "run" / "items").mkdir(parents=True)
    (tmp_path / "evals" / "run" / "items" / "p.json").write_text(json.dumps({**item, "status": "failed", "reason": "x"}))
    out.mkdir()
    write_folder(source, out, "fp32", 10**9, "mit", evaluation(source, tmp_path / "evals" / "run"))
    card = (out / "README.md").read_text()
    assert ModelCard(card).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "tags": ["everywhen"],
    }
    assert re.findall("^##? (.*)", card, re.M) == ["mine", "Architecture", "Use", "Training", "Evaluation", "Limits", "Licence"]
    assert "\n\n\n" not in card and "{{" not in card and "| `x` | n_heads 6, n_kv_heads 2 |\n" in card
    for part in (
        "LlamaForCausalLM",
        "books (0.3), web (0.7)",
        "491,520 in 30 steps",
        "lr 0.003",
        "1.23",
        "9.75",
        "3.457",
        "512 tokens",
        "n_kv_heads 2",
    ):
        assert part in card, part
    for name in ("loss", "held_out"):
        assert f"plots/{name}.png" in card and (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_bare_checkpoint_has_a_card_too(tmp_path: Path) -> None:
    source, out = checkpoint(tmp_path / "a" / "b" / "c", FAMILIES["mamba2"]), tmp_path / "hf"
    out.mkdir()
    write_folder(source, out, "fp32", 10**9, "apache-2.0")
    card = (out / "README.md").read_text()
    assert "Evaluation" not in card and "Training" not in card and "Mamba2ForCausalLM" in card and not (out / "plots").exists()
    assert "\n\n\n" not in card and "AutoTokenizer" in card
