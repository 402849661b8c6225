"""train.py with time cut over ranks: losses of one rank, under ZeRO, resumed with another number of slices; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.loader import BatchLoader, Reader
from tests.conftest import SMALL, run_ranks
from training.config.cli import checked, compose_config
from training.errors import UserError

WORK = Path(__file__).with_name("sequence_runs.py")


def launch(ranks: int, out: Path, shards: Path) -> dict[str, list[float]]:
    """What sequence_runs.py measured on `ranks` ranks: {cell: losses}."""
    done = run_ranks(ranks, ["-m", "tests.parallel.sequence_runs", str(shards), str(out)])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_losses_of_two_and_four_ranks_are_those_of_one(demo_shards: Path, tmp_path: Path) -> None:
    one, two, four = (launch(n, tmp_path / f"{n}.json", demo_shards) for n in (1, 2, 4))
    for name, losses in {**two, **four}.items():
        model, variant, _, _ = name.split()
        exact = one[f"{model} {'plain' if variant in ('recompute', 'compile') else variant} one"]
        assert len(losses) == len(exact) == 4 and exact[0] != exact[-1]
        assert np.allclose(losses, exact, rtol=2e-3 if variant == "bf16" else 1e-5, atol=0), (name, losses, exact)


def test_a_run_goes_on_with_another_number_of_slices(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    quiet = ["eval=end", "eval.tokens=256", "schedule=constant", "eval.sample_tokens=1"]
    for name, overrides, ranks in (
        ("whole", ["train.steps=5"], 1),
        ("moved", ["train.steps=3", "parallel.sequence=2"], 2),
        ("moved", ["train.steps=5"], 1),
    ):
        done = train(name, *quiet, *overrides, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in ("whole", "moved")]
    # Loss by position over ranks: a finished run only evaluates.
    perplexities = [json.loads((tmp_path / "moved" / "eval.json").read_text())["perplexity"]]
    done = train("moved", *quiet, "train.steps=5", "parallel.sequence=2", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    perplexities.append(json.loads((tmp_path / "moved" / "eval.json").read_text())["perplexity"])
    assert perplexities[0]["tokens"] == perplexities[1]["tokens"] == 256 and len(perplexities[0]["by_position"]) == 6
    assert np.isclose(perplexities[0]["bits_per_byte"], perplexities[1]["bits_per_byte"], rtol=1e-5)
    for a, b in zip(*(part["by_position"] for part in perplexities)):
        assert a["from"] == b["from"] and a["tokens"] == b["tokens"] and np.isclose(a["nats_per_token"], b["nats_per_token"], rtol=1e-4)
    whole, moved = ([row["loss"] for row in part if "loss" in row] for part in rows)
    assert len(whole) == 5 and np.allclose(moved, whole, rtol=1e-5, atol=0)


class Counting(Reader):
    seq_len = 8

    def samples(self, k_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = k_R[:, None] * 100 + np.arange(9)
        return tokens, (np.arange(9) // 3)[None].repeat(len(k_R), 0).astype(np.int32)


def test_slices_of_a_row_make_the_row() -> None:
    with BatchLoader(Counting(), global_batch=4, micro_batch=2) as loader:
        whole = loader.step(3)
    parts = []
    for n in range(4):
        with BatchLoader(Counting(), global_batch=4, micro_batch=2, slice_of=(n, 4)) as loader:
            parts.append(loader.step(3))
    for i, batch in enumerate(whole):
        assert all(part[i].sample_ids == batch.sample_ids for part in parts)
        for key in ("input_ids", "labels", "segment_ids"):
            assert torch.equal(torch.cat([getattr(part[i], key) for part in parts], 1), getattr(batch, key)), key
    with pytest.raises(ValueError, match="no slice"):
        BatchLoader(Counting(), global_batch=4, micro_batch=2, slice_of=(0, 3))


@pytest.mark.parametrize(
    "ranks,overrides,words",
    [
        (3, ["parallel.sequence=2"], "does not divide the 3 rank"),
        (2, ["parallel.sequence=0"], "must be above zero"),
        (2, ["parallel.sequence=2", "train.seq_len=31"], "does not divide train.seq_len 31"),
        (2, ["parallel.sequence=2", "train.initial_state=pass"], "needs train.initial_state=zero"),
        (2, ["parallel.sequence=2", "train.seq_len=4"], "shorter than the 3 a convolution looks back"),
        (8, ["parallel.sequence=2"], "4 group(s) of 2 ranks"),
    ],
)
def test_what_cannot_be_split_is_said_in_a_sentence(ranks: int, overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=words.replace("(", r"\(").replace(")", r"\)")):
        checked(compose_config([*SMALL, *overrides]))
