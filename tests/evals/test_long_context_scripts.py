"""The state-collapse study and the million-token bench: their arms, stopping and going on, and what they write, at toy size."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.files import write_json
from scripts.bench import long_context as bench_long_context
from scripts.studies import arms as study
from scripts.studies import collapse as long_context_study
from training.errors import UserError


def settings(shards: Path, out: Path, **more: Any) -> dict[str, Any]:
    values = (
        long_context_study.DEFAULTS | {"data": str(shards), "out": str(out), "size": "cpu", "device": "cpu", "tokens": 4 * 512.0} | more
    )
    long_context_study.settle(values, False)
    return values


def test_arms_are_those_of_the_sheet() -> None:
    for size, (large, short) in {"gpu": (256, 128), "cpu": (128, 32)}.items():
        arms, T = study.study_arms(size), study.SIZES[size]["T"]
        grid = {(a["N"], a["T"]) for name, a in arms.items() if a["pattern"] == ["m"] and "initial" not in a and a["T"] != T["shorter"]}
        assert len(grid) == 4 and all(a.get("from", name) in arms for name, a in arms.items())
        assert {f"{kind}" for kind in ("pass", "then-pass")} <= {a.removeprefix(f"mamba2-n{large}-t{short}-") for a in arms}
        assert list(arms).index(f"mamba2-n{large}-t{short}-slow") < list(arms).index(f"mamba2-n{large}-t{short}-slow-then-pass")


def test_a_slow_arm_begins_with_memories_far_beyond_T(demo_shards: Path, tmp_path: Path) -> None:
    name = "mamba2-n16-t32-slow"
    arm = study.Arm(name, settings(demo_shards, tmp_path), torch.device("cpu"))
    A = arm.model.blocks[0].mixer.A_log.detach().exp()
    assert A.min().item() == pytest.approx(0.001) and A.max().item() == pytest.approx(0.016)


def test_an_arm_that_was_stopped_ends_as_one_that_was_not(demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HISTORY", ())
    monkeypatch.setattr(study.Arm, "curve", lambda self, beyond, rows: {"collapse": {}})
    name, device = "mamba2-n16-t32-slow", torch.device("cpu")
    study.train(name, settings(demo_shards, tmp_path / "whole"), device)
    stopped = settings(demo_shards, tmp_path / "parts", until=time.time() - 1)
    for _ in range(3):
        with pytest.raises(study.TimeUp):
            study.train(name, stopped, device)  # the time is over after every step
    study.train(name, stopped | {"until": 0.0}, device)
    whole, parts = (load_file(tmp_path / part / "arms" / name / "model.safetensors") for part in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)
    record = json.loads((tmp_path / "parts" / "arms" / name / "train.json").read_text())
    assert record["steps"] == 4 and record["stops"] == 3 and record["tokens"] == 2048 and "commit" in record["environment"]
    assert not (tmp_path / "parts" / "arms" / name / "under_way.safetensors").exists()


def test_the_table_and_the_plot_come_from_the_files(tmp_path: Path) -> None:
    name, out = "mamba2-n16-t32", tmp_path
    arm = {"arm": name, "T": 32, "parameters": 5, "state_elements": 7, "tokens": 100, "loss": 2.0, "history": []}
    write_json(out / "arms" / name / "train.json", arm)
    buckets = [{"from": 0, "to": 32, "nats_per_token": 2.0}, {"from": 32, "to": 64, "nats_per_token": 2.7}]
    judged = {"delta": [0.7], "delta_at_end": 0.7, "onset_0.1": 32, "onset_0.5": 32, "forgets_2x": True, "verdict": "collapses (0.5 nat)"}
    write_json(
        out / "evals" / name / "items" / "position-prose.json", {"status": "done", "result": {"buckets": buckets, "collapse": judged}}
    )
    text = long_context_study.table(out, [name, "not-there"])
    assert "collapses (0.5 nat)" in text and text.count("\n") == 2
    long_context_study.plot(out, [name])
    assert (out / "study.png").stat().st_size > 1000


def test_mistakes_of_both_are_sentences(tmp_path: Path, demo_shards: Path) -> None:
    with pytest.raises(UserError) as raised:
        settings(tmp_path, tmp_path, device="tpu", only="wavelet")
    assert [word in " ".join(raised.value.problems) for word in ("device=tpu", "no token shards", "No arm has 'wavelet'")] == [True] * 3
    with pytest.raises(UserError, match="gpu or cpu"):
        settings(demo_shards, tmp_path, size="huge")
    with pytest.raises(UserError, match="There is no model 'lstm'"):
        bench_long_context.main(["models=lstm"])


def test_the_bench_writes_every_pass_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench_long_context.MODELS, "small", ({"type": "mamba2", "d_state": 8, "head_dim": 16}, 1))
    words = ["models=small", "width=16", "device=cpu", "chunk=64", f"out={tmp_path}/million.json"]
    bench_long_context.main([*words, "lengths=100"])
    bench_long_context.main([*words, "lengths=100,300"])
    result = json.loads((tmp_path / "million.json").read_text())
    passes = result["models"]["small"]["passes"]
    assert list(passes) == ["100", "300"] and passes["300"]["buckets"][-1]["to"] == 300 and passes["300"]["peak_memory_bytes"] > 0
    assert {"commit", "device", "torch"} <= set(result["environment"]) and result["models"]["small"]["verdict"]["to"] == 300
    bench_long_context.main([*words, "lengths=100,300"])
    assert "there already" in capsys.readouterr().out
    assert bench_long_context.verdict({"1": {"length": 1, "peak_memory_bytes": 100, "seconds": 1.0}, "9": {"length": 9, "peak_memory_bytes": 150, "seconds": 2.0}}, True)[
        "memory_independent_of_length"
    ] is False  # fmt: skip
