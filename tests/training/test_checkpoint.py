"""Checkpoints as files: cut over ranks and put together again at any stage, read across files, verified."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.hub.weights import Weights, write_tensors
from tests.conftest import run_ranks
from tests.training.savers import saver_of
from training import checkpoint
from training.errors import UserError
from training.zero.local_state import Stretch, share


def work(what: str, ranks: int, shards: Path, folder: Path) -> dict[str, Any]:
    done = run_ranks(ranks, ["-m", "tests.training.reshape", what, str(shards), str(folder)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / f"{what}{ranks}.json").read_text())


@pytest.mark.slow
def test_four_ranks_write_what_two_and_one_read_at_every_stage(demo_shards: Path, tmp_path: Path) -> None:
    saved = work("save", 4, demo_shards, tmp_path)
    assert saved["zero0"]["uneven"] > 0, "no parameter is split unequally"
    for stage in range(4):
        folder, exact = checkpoint.folder_of(tmp_path / f"zero{stage}", 2), load_file(tmp_path / f"whole{stage}.safetensors")
        read = {**{n: Weights(folder).tensor(n) for n in Weights(folder).names()}}
        read |= {n: Weights(folder, "optimizer").tensor(n) for n in Weights(folder, "optimizer").names()}
        assert read.keys() == exact.keys() and all(torch.equal(read[n], exact[n]) for n in exact), stage
        sizes = [p.stat().st_size for p in sorted(folder.glob("optimizer-*.safetensors"))]
        assert len(sizes) == 4 and max(sizes) < 1.3 * min(sizes)
    for ranks in (2, 1):
        loaded = work("load", ranks, demo_shards, tmp_path)
        assert len(loaded) == (16 if ranks == 2 else 4)
        for pair, row in loaded.items():
            assert row["differ"] == [] and row["steps"] == 3, (ranks, pair, row)
            assert row["loss"] == pytest.approx(saved[f"zero{pair[0]}"]["loss"], rel=1e-6), (ranks, pair)


@pytest.mark.slow
def test_a_nan_gradient_on_one_rank_is_left_out_by_all(demo_shards: Path, tmp_path: Path) -> None:
    for stage, row in work("nan", 2, demo_shards, tmp_path).items():
        assert row["skipped"] == ["gradient norm is not finite"] * 2 and row["same"] and row["steps"] == 1, (stage, row)
        assert row["loss"] == row["vetoed"], (stage, row)


def test_shares_cover_everything_once() -> None:
    tensors = {f"p{n}": torch.arange(n) + 1000 * n for n in (5, 1, 17, 0, 2)}
    for size in (1, 2, 3, 4, 30):
        parts = [share([Stretch(name, 0, values) for name, values in tensors.items()], rank, size) for rank in range(size)]
        counts = [sum(s.values.numel() for s in part) for part in parts]
        assert sum(counts) == 25 and max(counts) - min(counts) <= 1
        for name, values in tensors.items():
            cuts = sorted((s for part in parts for s in part if s.name == name), key=lambda s: s.first)
            assert torch.equal(torch.cat([values[:0], *(s.values for s in cuts)]), values)
            assert [s.first for s in cuts] == [0, *(s.end for s in cuts)][: len(cuts)]


def test_the_file_is_what_the_library_reads_and_its_hash_is_true(tmp_path: Path) -> None:
    tensors = {
        "a.b": torch.randn(3, 4, 1),
        "empty": torch.empty(0),
        "scalar": torch.tensor(2.0),
        "bytes": torch.arange(7, dtype=torch.uint8),
    }
    entry = write_tensors(tmp_path / "x.safetensors", tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[n], t) and read[n].shape == t.shape for n, t in tensors.items())
    assert entry == {"bytes": (tmp_path / "x.safetensors").stat().st_size, "sha256": checkpoint.digest(tmp_path / "x.safetensors")}
    assert write_tensors(tmp_path / "y.safetensors", {})["bytes"] > 0 and load_file(tmp_path / "y.safetensors") == {}
    stop = threading.Event()
    stop.set()
    with pytest.raises(OSError, match="given up"):
        write_tensors(tmp_path / "z.safetensors", tensors, stop)


def cut_in_two(folder: Path, parts: Any = None) -> torch.Tensor:
    whole = torch.randn(5, 3)
    for i, part in enumerate((whole.view(-1)[:7], whole.view(-1)[7:])):
        save_file({"w": part.clone()}, folder / f"model-{i}.safetensors")
    table = {"w": {"shape": [5, 3], "parts": parts or [["model-1.safetensors", 7, 15], ["model-0.safetensors", 0, 7]]}}
    (folder / "model.index.json").write_text(json.dumps({"tensors": table}))
    return whole


def test_stretches_are_read_across_files(tmp_path: Path) -> None:
    whole = cut_in_two(tmp_path)
    weights = Weights(tmp_path)
    assert weights.names() == ["w"] and weights.shape("w") == (5, 3) and torch.equal(weights.tensor("w"), whole)
    for first in range(15):
        for end in range(first, 16):
            assert torch.equal(weights.stretch("w", first, end), whole.view(-1)[first:end])


def test_export_and_loading_read_what_several_ranks_wrote(tmp_path: Path) -> None:
    from models.hub.export import write_folder
    from tests.hub.test_native_export import FAMILIES
    from tests.hub.test_native_export import checkpoint as made

    whole, cut = made(tmp_path / "whole", FAMILIES["llama"]), tmp_path / "cut"
    cut.mkdir()
    tensors, table = (
        load_file(whole / "model.safetensors"),
        {n: {"shape": list(t.shape), "parts": []} for n, t in load_file(whole / "model.safetensors").items()},
    )
    for rank in range(3):
        part = share([Stretch(n, 0, t.view(-1)) for n, t in tensors.items()], rank, 3)
        write_tensors(cut / f"model-{rank}.safetensors", {s.name: s.values for s in part})
        for s in part:
            table[s.name]["parts"].append([f"model-{rank}.safetensors", s.first, s.end])
    (cut / "model.index.json").write_text(json.dumps({"tensors": table}))
    for name in ("config.json", "tokenizer.json"):
        (cut / name).write_bytes((whole / name).read_bytes())
    for source in (whole, cut):
        (tmp_path / f"out-{source.name}").mkdir()
        write_folder(source, tmp_path / f"out-{source.name}", "bf16", 1 << 40, "apache-2.0")
    assert (tmp_path / "out-whole" / "model.safetensors").read_bytes() == (tmp_path / "out-cut" / "model.safetensors").read_bytes()
    a, b = (checkpoint.load_model(folder)[0].state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "parts",
    [
        [["model-0.safetensors", 0, 7]],
        [["model-0.safetensors", 0, 7], ["model-1.safetensors", 6, 15]],
        [["model-0.safetensors", 0, 7], ["../model-1.safetensors", 7, 15]],
        [["model-0.safetensors", 0]],
        "parts",
    ],
)
def test_an_index_with_gaps_or_ways_out_is_refused(tmp_path: Path, parts: Any) -> None:
    cut_in_two(tmp_path, parts)
    with pytest.raises(UserError, match="not the index of a checkpoint"):
        Weights(tmp_path)


def test_checkpoints_of_the_first_format_are_read_and_later_ones_refused(tmp_path: Path) -> None:
    saver, _ = saver_of(tmp_path)
    with saver:
        saver.save({"step": 1})
    folder = checkpoint.folder_of(tmp_path, 1)
    marker = json.loads((folder / "COMPLETE.json").read_text())
    for number, words in ((1, ""), (3, "is of format 3, this program reads 1 and 2")):
        (folder / "COMPLETE.json").write_text(json.dumps({**marker, "format": number}))
        assert (words in checkpoint.verify(folder)) if words else checkpoint.verify(folder) == ""
