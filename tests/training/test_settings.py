"""Settings mean one thing: every number has a range, a wrong name gets the right one, a text the quotes it needs, and a size its learning rate."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from data.files import finite
from models import mixers
from models.config import RANGES, ModelConfig
from tests.mixers import mixer_configs
from training.config import checks, cli, ranges, suggest
from training.config.checks import check
from training.config.cli import checked, compose_config, resolved_yaml
from training.config.schema import Config
from training.cost import fit
from training.errors import UserError
from training.result import StepResult
from training.watch.metrics import Metrics
from training.world import World


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        checked(compose_config(list(arguments)))
    return str(caught.value)


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return dataclasses.asdict(checked(compose_config(["model=transformer"])))


def changed(mapping: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `mapping` with another value at the dotted key; of a list the first entry's."""
    head, _, rest = key.partition(".")
    inner = changed(mapping[head], rest, value) if rest else [value, *mapping[head][1:]] if isinstance(mapping.get(head), list) else value
    return {**mapping, head: inner}


NUMBERS = dict(ranges.declared(Config))


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_range_and_what_lies_outside_is_refused(composed: dict[str, Any], key: str) -> None:
    limits = NUMBERS[key]
    assert limits is not None, "declare it: key: Annotated[int, Range(...)]"
    outside = [math.nan, math.inf, -math.inf, limits.low if limits.above else limits.low - 1]
    outside += [2 * limits.high] if limits.high < math.inf else []
    for value in outside:
        with pytest.raises(UserError, match=rf"{key}(\[0\])? must be"):
            check(changed(composed, key, int(value) if math.isfinite(value) and value == int(value) else value))


def test_all_problems_are_told_at_once_and_with_what_zero_does() -> None:
    told = refusal(
        "train.grad_clip=-1",
        "eval.every=-1",
        "eval.tokens=0",
        "optim.lr=nan",
        "train.steps=0.5",
        "seed=-1",
        "schedule.kind=cosinus",
        "model.norm_eps=inf",
    )
    for words in (
        "train.grad_clip must be zero or more, not -1.0; 0 switches clipping off",
        "eval.every must be",
        "eval.tokens must be",
        "optim.lr must be a finite",
    ):
        assert words in told
    for words in ("train.steps must be a whole number", "seed must be", "model.norm_eps must be at most"):
        assert words in told
    assert len(told.splitlines()) == 7, "of a kind that is unreadable the choices wait"


@pytest.mark.parametrize(
    "words,expected",
    [
        (["schedule.warmup=301"], "longer than the 300 steps of the run"),
        (["schedule.warmup=1e7", "schedule.unit=tokens"], "else it counts tokens"),
        (["train.steps=null", "train.tokens=1e5", "schedule.warmup=20"], "longer than the 13 steps"),
        (["schedule=wsd", "schedule.decay=400"], "schedule.decay 400 is 400 steps"),
        (["schedule=wsd", "schedule.warmup=0.5", "schedule.decay=0.6"], "take 150 + 180 steps"),
        (["profile=true", "profile_start=301"], "lower profile_start"),
        (["optim.betas=[0.9,1.0]"], "two numbers"),
        (["faults.spike_factor=0.5"], "above 1"),
        (["data.path={a: x, b: 1}"], "weight of a must be a number"),
        (["data.path={a: 0, b: 0}"], "weight 0"),
        (["experiment=synthetic/mqar", "data.task.symbols=1000000000"], "at most 1,000,000"),
    ],
)
def test_what_is_too_long_for_the_run_or_fits_nothing_is_refused(words: list[str], expected: str) -> None:
    assert expected in refusal(*words)


def test_what_will_not_happen_in_a_short_run_is_noted() -> None:
    config = checked(
        compose_config(
            [
                "train.steps=50",
                "checkpoint.every=60",
                "checkpoint.milestones=[40,90]",
                "experiment=synthetic/parity",
                "data.curriculum=64000",
            ]
        )
    )
    config.train.steps = 50
    told = " ".join(checks.notes(config))
    assert "eval.every=500" in told and "checkpoint.every=60" in told and "holds 90" in told and "data.curriculum=64,000" in told
    assert checks.notes(checked(compose_config([]))) == []
    words = ["model=transformer", "model.mixers.attention.window=1000", "train.steps=6", "profile=true", "distill.kl=2"]
    told = " ".join(checks.notes(checked(compose_config(words))))
    assert "window=1,000 is longer than train.seq_len=256" in told and "profile_steps=3 reaches beyond the run of 6" in told
    assert "no distill.teacher: nothing is distilled" in told
    config = checked(compose_config(["schedule=wsd", "train.steps=20", "schedule.warmup=0.02", "schedule.decay=0.07"]))
    assert {config.lr_at(step, 0) for step in range(20)} == {config.peak_lr}
    told = " ".join(checks.notes(config))
    assert "schedule.warmup=0.02 is less than a step" in told and "schedule.decay=0.07 is less than two steps" in told


@pytest.mark.parametrize("plain", mixer_configs().values(), ids=mixer_configs())
def test_numbers_of_mixers_are_finite(plain: dict[str, Any]) -> None:
    for key, value in plain.items():
        if isinstance(value, float):
            for wrong in (math.nan, math.inf, -1e9):
                config, problems = mixers.parse("x", {**plain, key: wrong}, 64)
                assert config is None and problems, (key, wrong)


@pytest.mark.parametrize("key", RANGES)
def test_numbers_of_models_have_ranges(key: str) -> None:
    kind = type(getattr(ModelConfig(8), key))
    for wrong in (math.nan, math.inf, -2.0) if kind is float else (-2, 10**11):
        settings: dict[str, Any] = {"vocab_size": 8, key: wrong}
        assert any(f"model.{key} must be" in line for line in ModelConfig(**settings).problems())


@pytest.mark.parametrize(
    "argument,expected",
    [
        ("lr=1e-3", "did you mean 'optim.lr'"),
        ("+lr=1e-3", "did you mean 'optim.lr'"),
        ("train.lr=1e-3", "did you mean 'optim.lr'"),
        ("steps=5", "did you mean 'train.steps'"),
        ("train.seed=1", "did you mean 'seed'"),
        ("train.learning_rate=1", "did you mean 'optim.lr'"),
        ("parallel.betsa=1", "did you mean 'optim.betas'"),
        ("batch_size=8", "did you mean 'train.global_batch'"),
        ("optim.grad_clip=1", "did you mean 'train.grad_clip'"),
        ("recurrent_max=0.9", "model.mixers.paragru.recurrent_max"),
        ("n_layers=3", "did you mean 'size.n_layers'"),
        ("seqlen=64", "did you mean 'train.seq_len'"),
        ("models=mamba2", "did you mean 'model'"),
        ("train.model=mamba2", "did you mean 'model'"),
        ("optimizer=adamw", "did you mean 'optim'"),
        ("train.steps.x=3", "did you mean 'train.steps'"),
        ("experiment=parity", "did you mean experiment=synthetic/parity?"),
        ("size=400M", "did you mean size=400m?"),
        ("deepspeed=2", "did you mean deepspeed=zero2?"),
        ("data=runs/data/mine", "data=shards data.path=runs/data/mine"),
        ("model=runs/first", "train.start_from=runs/first"),
        ("model=hf:", "names no folder"),
        ("data.path=[a,b]", "write 'data.path={a: 0.5, b: 0.5}'"),
        ("data.path=a,b", "'data.path={a: 1, b: 1}'"),
        ("name=a,b", "several runs take -m"),
        ("name=[v2]", """'name="[v2]"'"""),
        ("name=", "name is empty"),
        ("run_dir=", "run_dir is empty"),
        ("train.start_from=", "train.start_from is empty"),
        ("=5", "Cannot read"),
        (" train.steps=5", "write train.steps=5"),
        ("train:steps=5", "write train.steps=5"),
        ("data=null", "choose one of demo, shards"),
        ("experiment=pararnn_mamba2", "one of the 4 that begin with it"),
        ("data.task.name=parity", "Unknown key 'data.task'; known keys"),
        ("name=${x}", "refers to a key that does not exist"),
        ("train.steps", "write key=value"),
        ("data=shards", "data.path is not given"),
        ("+data.task.name=???", "data.task.name is not given"),
    ],
)
def test_a_wrong_place_or_name_gets_the_right_one(argument: str, expected: str) -> None:
    told = refusal("model=paragru", argument) if "model" not in argument else refusal(argument)
    assert expected in told and "???" not in told.replace(argument, ""), told


@pytest.mark.parametrize(
    "name", ["run#1", "~x", "ä,ö", "中文#1", "a=b c", "run(1)", "x&y", "a'b", 'a"b', "{a}", "a: b, c", "[v2]", "back\\slash\\"]
)
def test_names_that_hydra_cannot_read_get_the_quoting_that_works(name: str) -> None:
    words = suggest.quoted("name", name)
    given = shlex.split(words)
    assert len(given) == 1 and checked(compose_config(given)).name == name
    if name not in ("a: b, c", "[v2]", "back\\slash\\"):
        assert words in refusal(f"name={name}")


def test_text_stays_text_and_home_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = checked(compose_config(["name=1e3", "data.path=007", 'run_dir="~/run"']))
    assert (config.name, config.data.path, config.run_dir) == ("1e3", "007", "/home/me/run")
    config = checked(compose_config(["name=läuft 💡", "data.path=資料/a-1", "run_dir=~/größer"]))
    assert (config.name, config.data.path, config.run_dir) == ("läuft 💡", "資料/a-1", "/home/me/größer")
    config = checked(compose_config(["train.start_from=runs/läuft/seed=1", "run_dir=~/optim.lr=1e-3"]))
    assert (config.train.start_from, config.run_dir) == ("runs/läuft/seed=1", "/home/me/optim.lr=1e-3"), "folders of a sweep"
    with pytest.raises(UserError, match="Cannot read"):  # quotes around two arguments, not a name
        compose_config(["name=läuft train.steps=3"])


@pytest.mark.parametrize("folder", ["資料/a-1", "../größer (2)", "it's", 'a"b', "a\\b", "a,b: c=d", "x#y&z", "a{b}"])
def test_the_folders_of_a_mixture_may_have_any_name(folder: str) -> None:
    for written in (
        json.dumps({folder: 0.25, "b": 1}, ensure_ascii=False),
        yaml.safe_dump({folder: 0.25, "b": 1}, default_flow_style=True),
    ):
        composed = compose_config([f"data.path={written.strip()}"])
        assert checked(composed).data.path == {folder: 0.25, "b": 1}
        assert yaml.safe_load(resolved_yaml(composed, checked(composed)))["data"]["path"] == {folder: 0.25, "b": 1}


def test_a_mixture_that_cannot_be_read_is_not_taken_for_a_folder() -> None:
    for wrong in ("{é:1}", "{é: x}", "{é: 1", "{'a': [1]}"):
        assert "a mixture is written 'data.path={a: 1, b: 2}', with a space behind each colon" in refusal(f"data.path={wrong}")


@pytest.mark.parametrize("words", ["hf:a b/c", "'hf:a b/c'", '"hf:a b/c"'])
def test_a_folder_of_weights_may_stand_in_quotes(words: str) -> None:
    assert compose_config([f"model={words}"]).model.init_from == "a b/c"


def test_dashes_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--train.steps=3", "--lr", "1"])
    assert cli.run(lambda: None) == 2 and capsys.readouterr().err.count("without dashes") == 2


@pytest.mark.parametrize(
    "model,size,rate",
    [
        ("hybrid", "tiny", 3e-3),
        ("paragru", "400m", 5e-3),
        ("paralstm", "400m", 3e-3),
        ("transformer", "1b", 2e-3),
        ("hybrid", "1b", 2e-3),
        ("mamba2", "7b", 3e-3),
    ],
)
def test_the_learning_rate_goes_with_size_and_model(model: str, size: str, rate: float) -> None:
    composed = compose_config([f"model={model}", f"size={size}"])
    config = checked(composed)
    assert config.peak_lr == rate and OmegaConf.create(resolved_yaml(composed, config)).optim.lr == rate
    assert checked(compose_config([f"model={model}", f"size={size}", "optim.lr=1e-4"])).peak_lr == 1e-4


class Vocabulary:
    vocab_size = 32000


@pytest.mark.parametrize(
    "words,device,ranks,gib,expected",
    [
        (["size=tiny"], "cpu", 1, 24, ""),
        (["model=paragru", "size=400m", "train.seq_len=2048", "train.precision=bf16"], "cuda", 1, 80, ""),
        (["model=transformer", "size=400m", "train.seq_len=2048", "train.micro_batch=32"], "cuda", 1, 24, "train.micro_batch=4 needs"),
        (["model=transformer", "size=3b", "train.seq_len=2048", "train.micro_batch=1"], "cuda", 8, 24, "deepspeed=zero2"),
        (["model=transformer", "size=7b", "train.seq_len=2048"], "cpu", 1, 24, "no smaller micro-batch"),
    ],
)
def test_a_run_that_cannot_fit_says_what_to_change(words: list[str], device: str, ranks: int, gib: int, expected: str) -> None:
    config, world = checked(compose_config(words)), World(0, ranks, torch.device(device))
    told = fit.misfit(config, [(Vocabulary(), 1.0)], world, gib * 2**30)
    assert (told == "") == (expected == "") and expected in told
    if told:
        assert f"has {gib}.0" in told and "train.check_memory=false" in told
        config.train.check_memory = False
        assert fit.misfit(config, [(Vocabulary(), 1.0)], world, gib * 2**30) == ""


def test_metrics_of_a_step_without_numbers_are_json(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, Config(), torch.device("cpu"), 1, 1, True)
    metrics.open(0, None)
    ranks = {"communication_share": 0.0, "slowest_rank": 0, "ranks": {"a": [math.nan]}}
    metrics.step(1, StepResult(math.nan, math.inf, 1, "loss is not finite", 1.0), 1.0, 0.0, ranks)
    metrics.close()

    def refuse(text: str) -> None:
        raise AssertionError(text)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] is None and row["ranks"] == {"a": [None]} and row["lr"] == 1.0
    assert finite({1: (math.nan, 2)}) == {"1": [None, 2]}
