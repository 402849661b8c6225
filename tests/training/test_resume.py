"""Going on with a run and beginning from one: samples and tokens are counted, nothing is read twice or left out, and what changed is told."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from models.config import ModelConfig
from models.lm import LanguageModel
from tests.conftest import run_ranks
from tests.training.test_runs import QUIET, losses, mistake, ok
from training import checkpoint, cursor, fork, setup
from training.config import changes
from training.config.cli import checked, compose_config, resolved_yaml
from training.config.schema import Config, Position
from training.errors import UserError
from training.result import StepResult
from training.watch.metrics import Metrics
from training.world import World

Train = Callable[..., subprocess.CompletedProcess[str]]
BASE = ["data.path=d", "train.steps=100", "train.seq_len=32", "train.global_batch=4", "train.micro_batch=2"]


def config_of(*words: str) -> Config:
    return checked(compose_config([*BASE, *words]))


def settings_of(*words: str) -> dict[str, Any]:
    composed = compose_config([*BASE, *words])
    resolved = OmegaConf.to_container(OmegaConf.create(resolved_yaml(composed, checked(composed))))
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def test_samples_and_tokens_are_counted_over_batches() -> None:
    at = cursor.begin(config_of(), [1.0])
    for _ in range(5):
        at.advance(config_of())
    at = cursor.read(json.loads(json.dumps(at.state())), settings_of(), config_of())
    other = config_of("train.global_batch=6")
    cursor.take_on(at, other, [1.0], "here")
    for _ in range(2):
        at.advance(other)
    assert (at.step, at.samples, at.tokens) == (7, 32, 1024) and at.notes == []
    again = cursor.read(json.loads(json.dumps(at.state())), settings_of(), config_of("train.global_batch=2"))
    assert (again.step, again.samples, again.tokens) == (7, 32, 1024), "what was read is known, not worked out from today's batch"


def test_a_checkpoint_without_a_cursor_counts_its_own_batches() -> None:
    old = {"step": 10, "tokens": 1280, "fingerprint": ["x"]}
    run = settings_of("data.path={a: 1, b: 3}", "seed=7")
    at = cursor.read(old, run, config_of("train.global_batch=8", "seed=1"))
    assert (at.step, at.samples, at.tokens) == (10, 40, 1280)
    assert at.order == cursor.Order(32, "windows", 7, 4, [(0, [1.0, 3.0])])
    assert cursor.read(old, {}, config_of()).samples == 40


def test_what_cannot_go_on_points_to_a_new_run() -> None:
    for words, told in [
        (["train.seq_len=64"], "sequences of 32 tokens"),
        (["data.reader=stream"], "data.reader=windows"),
    ]:
        with pytest.raises(UserError, match=f"{told}.*train.start_from=here"):
            cursor.take_on(cursor.begin(config_of(), [1.0]), config_of(*words), [1.0], "here")
    stream = cursor.begin(config_of("data.reader=stream"), [1.0])
    with pytest.raises(UserError, match="states of 4 streams.*train.start_from"):
        cursor.take_on(stream, config_of("data.reader=stream", "train.global_batch=8", "train.initial_state=pass"), [1.0], "here")
    cursor.take_on(stream, config_of("data.reader=stream", "train.global_batch=8"), [1.0], "here")
    assert stream.order.rows == 4 and stream.notes == ["the data stay cut into 4 streams"]


def test_other_weights_hold_from_the_next_sample_and_other_seeds_not_at_all() -> None:
    at = cursor.begin(config_of(), [1.0, 1.0])
    cursor.take_on(at, config_of("seed=5"), [0.5, 0.5], "here")
    assert at.order.stretches == [(0, [1.0, 1.0])] and at.order.seed == 0 and at.notes == ["the order of the data stays that of seed 0"]
    at.samples = 40
    cursor.take_on(at, config_of(), [1.0, 3.0], "here")
    cursor.take_on(at, config_of(), [1.0, 2.0], "here")  # no sample was read in between
    assert at.order.stretches == [(0, [1.0, 1.0]), (40, [1.0, 2.0])] and "from sample 40 on" in at.notes[-1]


def test_a_start_tells_rate_schedule_and_compilation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(
        "train.compile=true",
        "schedule=wsd",
        "schedule.unit=tokens",
        "size=400m",
        "model=mamba2",
        "model.vocab_size=64",
        "train.check_memory=false",
    )
    with torch.device("meta"):
        model = LanguageModel(setup.model_config(config, None)[0])
    what, where, rate, compiling = setup._told(
        config, World(0, 1, torch.device("cpu")), model, cursor.begin(config, [1.0]), f"starting at step 0{setup.TOTAL}"
    )
    assert where == "starting at step 0 of 100" and "learning rate 0.005 (size=400m, arXiv 2510.21450, appendix C.1)" in rate
    assert (
        rate.endswith("schedule wsd over 12,800 tokens, 1,280 of warm-up, 2,560 of decay") and "first step compiles the model" in compiling
    )
    metrics = Metrics(tmp_path, config, torch.device("cpu"), 1, 1, True)
    metrics.open(0, None)
    for step in (1, 2):
        metrics.step(step, StepResult(1.0, 1.0, 1, "", 61.0), 1.0, 0.0)
    metrics.close()
    assert capsys.readouterr().out.count("compiled: the first step took 1:01.") == 1


class Prints:
    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = self.directory = fingerprint


def test_folders_in_another_order_are_put_right_and_others_refused(tmp_path: Path) -> None:
    shards: Any = [(Prints("b"), 0.3), (Prints("a"), 0.7)]
    setup._in_order(["a", "b"], shards, tmp_path)
    assert [(s.fingerprint, w) for s, w in shards] == [("a", 0.7), ("b", 0.3)]
    for wanted in (["a"], ["a", "c"], ["a", "b", "c"]):
        with pytest.raises(UserError, match="other data.*train.start_from"):
            setup._in_order(wanted, shards, tmp_path)


def test_settings_that_differ_are_listed() -> None:
    before = settings_of("model=paragru", "data.path={a: 1, b: 1}")
    now = settings_of(
        "model=paragru", "optim.lr=1e-4", "schedule=wsd", "seed=3", "train.precision=bf16", "model.mixers.paragru.recurrent_max=0.9",
        "data.path={a: 1, c: 1}", "name=other", "train.resume=none", "size.n_heads=2",
    )  # fmt: skip
    told = "\n".join(changes.differences(before, now))
    for words in (
        "optim.lr: 0.003 -> 0.0001",
        'schedule.kind: "cosine" -> "wsd"',
        "seed: 0 -> 3",
        'train.precision: "fp32" -> "bf16"',
        "recurrent_max: 0.5 -> 0.9",
    ):
        assert words in told
    assert "data.path.b: 1 -> not there" in told and "data.path.c: not there -> 1" in told
    assert "name" not in told and "resume" not in told and "size" not in told and changes.differences(before, before) == []


def test_a_model_of_a_folder_is_compared_as_it_was_built(tmp_path: Path) -> None:
    """model=hf: leaves the transformer's defaults where the architecture stands, and a run goes on under model=hybrid."""
    hybrid = settings_of("model=hybrid", "seed=3")
    folder = {**settings_of("model=transformer"), "model": {**settings_of("model=transformer")["model"], "init_from": "hub"}}

    def built(**attention: Any) -> ModelConfig:
        keys = {key: hybrid["model"][key] for key in ("d_model", "n_layers", "pattern", "mixers", "d_ff")}
        mixers = {**keys["mixers"], "attention": {**keys["mixers"]["attention"], **attention}}
        return ModelConfig.from_dict({**keys, "vocab_size": 300, "mixers": mixers})

    written_out = built(n_kv_heads=hybrid["model"]["mixers"]["attention"]["n_heads"])
    (tmp_path / "config.json").write_text(json.dumps({**written_out.to_dict(), "d_ff": written_out.mlp_width}))
    assert changes.differences(folder, hybrid) != ["seed: 0 -> 3"]
    assert changes.differences(*changes.compared(folder, hybrid, tmp_path, built())) == ["seed: 0 -> 3"]
    told = changes.differences(*changes.compared(folder, hybrid, tmp_path, built(window=128)))
    assert told == ["model.mixers.attention.window: 0 -> 128", "seed: 0 -> 3"]
    assert changes.compared(hybrid, hybrid, tmp_path / "none", built()) == (hybrid, hybrid)


def test_a_learning_rate_that_jumps_is_told_with_both_values() -> None:
    at = cursor.begin(config_of(), [1.0])
    at.step, at.samples, at.tokens = 100, 400, 12800
    longer = config_of("train.steps=1000")
    longer.at = at.position()
    told = changes.lr_jump(settings_of(), longer, at)
    assert "step 101 has 3.000e-03" in told and "give 3.000e-04" in told
    same = config_of()
    same.at = at.position()
    assert changes.lr_jump(settings_of(), same, at) == "" and changes.lr_jump({"optim": {"lr": "?"}}, same, at) == ""
    assert "this run is finished: it is at step 100 (12,800 tokens) and train.steps=100" in changes.finished(same, at)
    assert changes.finished(longer, at) == ""


def rates(config: Config, steps: int, tokens: int, tps: int) -> list[float]:
    return [config.lr_at(step, tokens + i * tps) for i, step in enumerate(range(steps, steps + 3))]


def test_schedules_count_steps_or_tokens() -> None:
    """A run of 12,800 tokens whose batch doubles half-way: the rate at a token is what it would have been, or that at a step."""
    words = ["train.steps=null", "train.tokens=12800", "schedule=linear", "schedule.warmup=0"]
    by_tokens, plain = config_of(*words, "schedule.unit=tokens", "train.global_batch=8"), config_of(*words, "schedule.unit=tokens")
    by_steps = config_of(*words, "train.global_batch=8")
    for config in (by_tokens, by_steps):
        config.at = Position(50, 6400)
        assert config.total_steps == 75
    assert by_tokens.lr_at(50, 6400) == pytest.approx(plain.lr_at(50, 6400)) == pytest.approx(1.5e-3)
    assert by_tokens.lr_at(60, 8960) == pytest.approx(plain.lr_at(70, 8960)) and by_steps.lr_at(60, 8960) == pytest.approx(3e-3 * 15 / 75)
    whole = config_of("schedule.unit=tokens", "schedule.warmup=1280")
    assert rates(whole, 20, 20 * 128, 128) == rates(config_of("schedule.warmup=10"), 20, 20 * 128, 128), "to the last bit"
    forked = config_of("train.steps=10", "schedule=linear", "schedule.warmup=0")
    forked.at = Position(100, 12800, 100, 12800)
    assert forked.total_steps == 110 and forked.lr_at(100, 12800) == 3e-3 and forked.lr_at(105, 13440) == pytest.approx(1.5e-3)


def test_config_yaml_keeps_its_history(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("old: 1\n")
    for text in ("seed: 0\n", "seed: 0\n", "seed: 1\n"):
        changes.keep_history(tmp_path, text, {"step": 3})
    assert (tmp_path / "config.yaml").read_text() == "seed: 1\n"
    assert [p.read_text() for p in sorted((tmp_path / "history").glob("config-*"))] == ["old: 1\n", "seed: 0\n", "seed: 1\n"]
    rows = [json.loads(line) for line in (tmp_path / "history" / "starts.jsonl").read_text().splitlines()]
    assert [row["config"] for row in rows] == ["config-0001.yaml", "config-0001.yaml", "config-0002.yaml"]


class Alone(World):
    def __init__(self) -> None:
        self.rank, self.size = 0, 1


def test_what_a_run_may_begin_from(tmp_path: Path) -> None:
    foreign = tmp_path / "hf"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for named, words in [
        (foreign, "model=hf:"),
        (tmp_path / "no", "There is no .* to begin from"),
        (tmp_path / "run", "no complete checkpoint yet"),
        (tmp_path, "not a complete checkpoint"),
    ]:
        with pytest.raises(UserError, match=words):
            fork.found(str(named), Alone(), "train.start_from")
    with pytest.raises(UserError, match="lies in the run folder"):
        fork.refuse_own(config_of(f"train.start_from={tmp_path}/run/checkpoints/step-1", f"run_dir={tmp_path}/run"))
    with pytest.raises(UserError, match=r"train.start_from=.*run and the model= and size="):
        checked(compose_config([f"model=hf:{tmp_path}/run", "data.path=d"]))
    for refused in (["train.start_from=x", "train.resume=y"], ["train.start_with=all"], ["train.start_from=x", "train.start_with=some"]):
        with pytest.raises(UserError, match="train.start_"):
            config_of(*refused)


def test_a_refused_start_leaves_no_new_folder(tmp_path: Path) -> None:
    config = config_of(f"run_dir={tmp_path}/new", f"train.start_from={tmp_path}/nothing")
    with pytest.raises(UserError, match="There is no"):
        setup.take_up(config, World(0, 1, torch.device("cpu")), None, [], "seed: 0")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="There is no"):
        setup.take_up(config, World(0, 1, torch.device("cpu")), None, [], "seed: 0")  # type: ignore[arg-type]
    assert (tmp_path / "new").is_dir()


def test_a_fork_has_a_wandb_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.checkpoint, "load_weights", lambda folder, model: None)
    monkeypatch.setattr(setup.fork, "check_tokenizer", lambda folder, tokenizer: None)
    run, shards = tmp_path / "run", [(SimpleNamespace(fingerprint="x", tokenizer=lambda: None), 1.0)]
    for order, step in enumerate((2, 4), start=1):
        folder = checkpoint.folder_of(run, step)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "tokens": 0, "fingerprint": ["x"], "wandb_id": "abc"}))
        (folder / checkpoint.MARKER).write_text(json.dumps({"order": order}))

    def wandb_id(step: int, *words: str, begins: bool = False) -> str | None:
        return setup._read(checkpoint.folder_of(run, step), begins, config_of(*words), Alone(), None, shards)[2]  # type: ignore[arg-type]

    assert wandb_id(4, f"run_dir={run}") == "abc" == wandb_id(4, f"run_dir={run}", f"train.resume={run}/checkpoints/step-00000004")
    assert wandb_id(2, f"run_dir={run}") == "abc", "the newest whole one after a fault"
    assert wandb_id(2, f"run_dir={run}", f"train.resume={run}/checkpoints/step-00000002") is None, "a branch"
    assert wandb_id(4, f"run_dir={tmp_path}/other", f"train.resume={run}") is None
    for kind in ("weights", "all"):
        assert wandb_id(4, f"run_dir={tmp_path}/other", f"train.start_from={run}", f"train.start_with={kind}", begins=True) is None


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def test_another_batch_goes_on_exactly_and_a_finished_run_says_so(train: Train, tmp_path: Path) -> None:
    """With the rate at (nearly) nothing losses are those of the samples: three steps of 4 and one of 8 see the samples of five of 4."""
    still = [*QUIET, "optim.lr=1e-30", "optim.weight_decay=0", "schedule=constant", "eval.sample_tokens=1"]
    ok(train("whole", *still, "train.steps=5"))
    ok(train("parts", *still, "train.steps=3"))
    out = ok(train("parts", *still, "train.steps=4", "train.global_batch=8", "seed=9"))
    assert "train.global_batch: 4 -> 8" in out and "seed: 0 -> 9" in out and "order of the data stays that of seed 0" in out
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert [parts[s] for s in (1, 2, 3)] == [whole[s] for s in (1, 2, 3)]
    assert parts[4] == pytest.approx((whole[4] + whole[5]) / 2, rel=1e-6)
    assert [row["tokens"] for row in rows_of(tmp_path / "parts")] == [128, 256, 384, 640]
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert (state["step"], state["samples"], state["tokens"]) == (4, 20, 640)
    out = ok(train("parts", *still, "train.steps=4", "train.global_batch=8", "seed=9"))
    assert "this run is finished" in out and "raise train.steps" in out and "differ" not in out
    assert len(list((tmp_path / "parts" / "history").glob("config-*.yaml"))) == 2
    mistake(train("parts", *still, "train.steps=9", "train.seq_len=16"), "begin a new run from it: train.start_from=")


@pytest.mark.slow
def test_a_run_begins_from_another_one(train: Train, tmp_path: Path) -> None:
    short = [*QUIET, "eval.sample_tokens=1", "schedule=constant", "schedule.warmup=0"]
    ok(train("first", *short, "train.steps=3"))
    ok(train("whole", *short, "train.steps=5"))
    source = f"train.start_from={tmp_path / 'first'}"
    out = ok(train("all", *short, source, "train.start_with=all", "train.steps=2"))
    assert "the data go on behind sample 12" in out
    assert list(losses(tmp_path / "all")) == [4, 5]
    assert losses(tmp_path / "all")[5] == losses(tmp_path / "whole")[5], "optimizer, step and data go on"
    longer = [*short, source, "train.seq_len=64", "train.global_batch=2", "train.steps=2", "model.mixers.paragru.recurrent_max=0.9"]
    out = ok(train("longer", *longer))
    assert ": the weights; at step 0 of 2" in out and "recurrent_max: 0.5 -> 0.9" in out and "train.seq_len: 32 -> 64" in out
    assert losses(tmp_path / "longer")[1] < losses(tmp_path / "first")[1]
    out = ok(
        train(
            "longer", *short, source, "train.seq_len=64", "train.global_batch=2", "train.steps=3", "model.mixers.paragru.recurrent_max=0.9"
        )
    )
    assert "resuming from" in out and list(losses(tmp_path / "longer")) == [1, 2, 3]
    mistake(
        train("longer", *short, f"train.start_from={tmp_path / 'whole'}", "train.seq_len=64", "train.global_batch=2"),
        "give the new run another name",
    )


@pytest.mark.slow
def test_two_ranks_change_the_batch_under_zero_and_begin_from_another_run(demo_shards: Path, tmp_path: Path) -> None:
    still = [
        *QUIET,
        "optim.lr=1e-30",
        "optim.weight_decay=0",
        "schedule=constant",
        "eval.sample_tokens=1",
        "train.micro_batch=1",
        "experiment=smoke",
    ]

    def run(name: str, *words: str) -> dict[int, float]:
        done = run_ranks(2, ["train.py", "train.device=cpu", f"data.path={demo_shards}", f"run_dir={tmp_path / name}", *still, *words])
        ok(done)
        return losses(tmp_path / name)

    whole = run("whole", "train.steps=6", "train.global_batch=2")
    run("parts", "train.steps=2", "train.global_batch=2", "deepspeed=zero2")
    parts = run("parts", "train.steps=4", "train.global_batch=4", "deepspeed=zero3")
    assert [parts[3], parts[4]] == pytest.approx([(whole[3] + whole[4]) / 2, (whole[5] + whole[6]) / 2], rel=1e-5)
    forked = run("forked", f"train.start_from={tmp_path / 'parts'}", "train.start_with=all", "train.steps=1", "train.global_batch=2")
    assert list(forked) == [5]
