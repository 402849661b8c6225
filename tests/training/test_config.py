"""Every config composes; every mistake is a sentence; mistakes are reported together."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment, run_program
from training.config.cli import CONFIG_DIR, checked, compose_config, config_groups
from training.cost.flops import meta_model
from training.errors import UserError
from training.setup import model_config

PUBLISHED = {  # millions of parameters in the ParaRNN comparison (arXiv 2510.21450, table 5)
    "transformer": {"400m": 412, "1b": 1440, "3b": 2800, "7b": 6890},
    "mamba2": {"400m": 409, "1b": 1430, "3b": 2830, "7b": 6960},
    "paragru": {"400m": 406, "1b": 1420, "3b": 2900, "7b": 6760},
    "paralstm": {"400m": 406, "1b": 1420, "3b": 2900, "7b": 6760},
}


@pytest.mark.parametrize("group,option", [(g, o) for g, options in config_groups().items() for o in options])
def test_every_config_file_composes(group: str, option: str) -> None:
    overrides = {"mixer": [f"+mixer@model.mixers.extra={option}"], "experiment": [f"experiment={option}"]}.get(group, [f"{group}={option}"])
    config = checked(compose_config([*overrides, "data.path=somewhere"]))
    assert config.total_steps > 0


@pytest.mark.parametrize("model,size", [(m, s) for m in PUBLISHED for s in PUBLISHED[m]])
def test_published_sizes_within_two_percent(model: str, size: str) -> None:
    config = checked(compose_config([f"model={model}", f"size={size}", "model.vocab_size=50432"]))
    count = sum(p.numel() for p in meta_model(model_config(config, None)[0]).parameters())
    assert abs(count / 1e6 / PUBLISHED[model][size] - 1) < 0.02


def test_kinds_of_the_delta_rule_are_those_of_their_mixers() -> None:
    for name in ("deltaproduct", "deltanet"):
        model = model_config(
            checked(compose_config([f"model={name}", f"+mixer@model.mixers.alone={name}", "model.vocab_size=32768"])), None
        )[0]
        made, alone = model.mixers["gated_deltanet"], model.mixers["alone"]
        assert {k: v for k, v in made.items() if k != "n_heads"} == {k: v for k, v in alone.items() if k != "n_heads"}


@pytest.mark.parametrize("size,low,high", [("tiny", 0.5e6, 8e6), ("35m", 25e6, 50e6), ("125m", 90e6, 170e6)])
@pytest.mark.parametrize("model", ["transformer", "mamba2", "paragru", "paralstm", "hybrid"])
def test_small_sizes(model: str, size: str, low: float, high: float) -> None:
    vocabulary = 2048 if size == "tiny" else 32768
    config = checked(compose_config([f"model={model}", f"size={size}", f"model.vocab_size={vocabulary}"]))
    assert low < sum(p.numel() for p in meta_model(model_config(config, None)[0]).parameters()) < high


@pytest.mark.parametrize(
    "arguments,expected",
    [
        (["train.stesp=4"], ["stesp", "'steps'"]),
        (["train.steps=abc"], ["train.steps must be"]),
        (["model=hybird"], ["hybird", "hybrid"]),
        (["~model"], ["model.pattern is missing; choose a model", "model.mixers is missing"]),
        (["~model.pattern"], ["model.pattern is missing"]),
        (["model.pattern=[[mamba2]]"], ["model.pattern[0] must be text"]),
        (["train.steps=0", "optim.lr=-1", "schedule.kind=cosinus"], ["train.steps", "optim.lr", "schedule.kind"]),
        (["model=transformer", "model.mixers.attention.n_heads=5"], ["n_heads"]),
        (["model=transformer", "model.pattern=[attention,nope]"], ["nope"]),
        (["model=transformer", "+model.mixers.attention.n_heads_typo=5", "train.steps=-1"], ["n_heads_typo", "train.steps"]),
        (["train.global_batch=30"], ["multiple"]),
        (["deepspeed.offload_parameters=cpu"], ["stage=3"]),
        (["train.fp8=true"], ["train.fp8", "train.precision=bf16"]),
        (["train.packed_attention=flash"], ["auto, own, torch"]),
        (["train.residual=fp16"], ["train.residual", "fp32, bf16"]),
        (["train.residual=bf16"], ["train.residual", "train.precision=bf16"]),
        (["train.tokens=1e6"], ["train.steps or train.tokens"]),
        (["train.steps=[1"], ["Cannot read"]),
    ],
)
def test_mistakes_are_sentences(arguments: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        checked(compose_config(arguments))
    for part in expected:
        assert part in str(caught.value)


def test_mistakes_on_the_command_line_exit_2_without_a_traceback() -> None:
    done = run_program(["train.py", "train.stesp=4", "optim.lrr=1"])
    assert done.returncode == 2
    assert "stesp" in done.stderr and "lrr" in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_help_and_dry_run() -> None:
    done = run_program(["train.py", "--help"])
    assert done.returncode == 0 and "deepspeed --num_gpus" in done.stdout and "paragru" in done.stdout
    done = run_program(["train.py", "dry_run=true", "model=paragru", "size=7b", "data.path=nowhere"])
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "FLOPs", "ZeRO stage", "steps"):
        assert word in done.stdout


def test_importing_the_packages_needs_no_gpu_and_no_command_line() -> None:
    code = "import models.lm, data.loader, evals.run, training.config.cli, train"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False).returncode == 0


def test_configs_lie_where_the_program_looks() -> None:
    assert CONFIG_DIR.is_dir() and {
        "model",
        "size",
        "mixer",
        "data",
        "optim",
        "schedule",
        "deepspeed",
        "logging",
        "eval",
        "experiment",
    } <= set(config_groups())
