"""A slice of scripts/check/matrix.py: losses of ZeRO stages, offload, accumulation and recomputation are those of plain torch in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.check import matrix
from tests.conftest import run_program, run_ranks
from tests.training.test_runs import Train, losses, ok
from training.config.cli import checked, compose_config
from training.errors import UserError

SLICE = {
    1: [
        "zero0, accumulation 2, recomputation full",
        "zero1, accumulation 1, offload optimizer",  # a single rank runs a stage only where it moves something to the host
        "zero2, accumulation 2, offload optimizer",
        "zero3, accumulation 2, offload optimizer and parameters",
    ],
    2: [
        "zero0, accumulation 1, recomputation none",
        "zero1, accumulation 2, offload optimizer",
        "zero2, accumulation 2, recomputation full",
        "zero3, accumulation 2, recomputation none",
        "zero3, accumulation 1, offload optimizer and parameters",
        "zero3, accumulation 1, hpz 2",
        "zero3, accumulation 2, gathered once a step",
    ],
}


@pytest.fixture(scope="module")
def plain_torch(demo_shards: Path) -> dict[str, list[float]]:
    return matrix.plain(str(demo_shards))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_those_of_plain_torch(ranks: int, plain_torch: dict[str, list[float]], demo_shards: Path, tmp_path: Path) -> None:
    names, out = tmp_path / "names.json", tmp_path / "found.json"
    names.write_text(json.dumps(SLICE[ranks]))
    ok(run_ranks(ranks, ["-m", "scripts.check.matrix", "worker", str(demo_shards), str(out), str(names), "False"]))
    rows = matrix.compare(plain_torch, json.loads(out.read_text()), ranks)
    assert len(rows) == len(SLICE[ranks])
    assert all(row["equal"] for row in rows), matrix.table(rows)


@pytest.mark.parametrize(
    "words,expected",
    [
        (["deepspeed=zero3", "deepspeed.offload_optimizer=nvme"], "deepspeed.nvme_path"),
        (["deepspeed=zero2", "deepspeed.offload_optimizer=nvme", "deepspeed.nvme_path=/tmp"], "deepspeed.stage=3"),
        (["deepspeed=zero1", "deepspeed.quantized_gradients=true"], "quantized_gradients needs deepspeed.stage=3"),
        (["deepspeed=zero2", "deepspeed.gather=step"], "set it to block"),
        (["deepspeed=zero3", "deepspeed.hpz=2"], "does not divide the 1 rank"),
        (["deepspeed=zero3", "deepspeed.quantized_weights=true", "train.precision=bf16"], "under autocast"),
    ],
)
def test_what_cannot_be_combined_is_a_sentence(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        checked(compose_config(words))


def test_offload_and_quantisation_that_would_need_a_compiler_are_refused_in_a_sentence(demo_shards: Path, tmp_path: Path) -> None:
    common = [
        "train.py",
        "experiment=smoke",
        "train.device=cpu",
        f"data.path={demo_shards}",
        f"run_dir={tmp_path / 'run'}",
        "deepspeed=zero3",
    ]
    for words, part in (
        (["deepspeed.offload_optimizer=nvme", f"deepspeed.nvme_path={tmp_path}"], "offload to cpu"),
        (["deepspeed.quantized_weights=true"], "set both to false"),
    ):
        done = run_program([*common, *words], CXX="no-such-compiler")
        assert done.returncode == 2 and part in done.stderr and "Traceback" not in done.stderr + done.stdout, done.stderr


@pytest.mark.slow
def test_moments_on_a_disk_are_written_and_taken_up_like_others(train: Train, tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio's headers")
    # groups over 1 MB
    words = [
        "size.d_model=256",
        "eval=end",
        "eval.tokens=256",
        "schedule=constant",
        "checkpoint.every=2",
        "train.steps=4",
        "deepspeed=zero3",
    ]
    nvme = ["deepspeed.offload_optimizer=nvme", f"deepspeed.nvme_path={tmp_path}"]
    ok(train("memory", *words))
    ok(train("disk", *words, *nvme, "train.steps=2"))
    ok(train("disk", *words, *nvme))
    memory, disk = losses(tmp_path / "memory"), losses(tmp_path / "disk")
    assert memory.keys() == disk.keys() and all(abs(memory[n] / disk[n] - 1) < 1e-6 for n in memory)
