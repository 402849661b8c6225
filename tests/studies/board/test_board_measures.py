"""The board's corpus and its figures, against sums written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.shards import ShardSet
from evals.adapters.own import OwnAdapter
from models.lm import LanguageModel
from scripts.board import architectures, corpus, measure
from scripts.board.results import Interval, difference, interval
from training.errors import UserError


def test_the_corpus_follows_from_its_documents_not_from_their_order(data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert corpus.make(str(data.parent / "b.jsonl"), again, 512, 100_000) == 0
    assert corpus.identity(again) == corpus.identity(data)
    corpus.part(data, tmp_path / "small")
    assert corpus.identity(tmp_path / "small", 60_000) == corpus.identity(data, 60_000) != corpus.identity(data)
    with pytest.raises(UserError, match="holds 10.,..."):
        corpus.identity(tmp_path / "small", 150_000)
    parts = corpus.split(data, tmp_path / "part", 260_000)
    assert len(parts) > 1 and all(sum(f.stat().st_size for f in p.iterdir()) <= 260_000 for p in parts)
    corpus.join(parts, tmp_path / "joined")
    assert corpus.identity(tmp_path / "joined") == corpus.identity(data)


def test_held_out_bits_are_those_of_documents_read_one_window_at_a_time(data: Path) -> None:
    shards = ShardSet(data, "valid")
    model = LanguageModel(architectures.model_config("gdn", "tiny", 512))
    model.init_weights(0)
    found = measure.held_out(model, shards, 100, "fp32", batch=7)
    nats, tokens, size = 0.0, 0, 0
    for i in range(shards.n_documents):
        ids, n_bytes = shards.document(i)
        size += n_bytes
        for a in range(0, len(ids) - 1, 100):
            piece = torch.from_numpy(ids[a : a + 101].astype(np.int64))[None]
            with torch.no_grad():
                logits = model(piece[:, :-1]).logits
            nats += float(torch.nn.functional.cross_entropy(logits[0].double(), piece[0, 1:], reduction="sum"))
            tokens += piece.shape[1] - 1
    assert found["tokens"] == tokens and found["bytes"] == size
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("row", ["gdn_hybrid_paragru", "mamba2", "dense_lstm", "m2rnn"])
def test_held_out_bits_of_a_graph_are_those_of_passes_as_written(row: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, device = ShardSet(data, "valid"), torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        model = LanguageModel(architectures.model_config(row, "probe", 512))
        model.init_weights(0)
        model.to(device)
        graphed = measure.held_out(model, shards, 128, "bf16", batch=8)
        monkeypatch.setattr("scripts.studies.graphed.WARMUP", 10**9)
        assert measure.held_out(model, shards, 128, "bf16", batch=8) == graphed


def test_a_repeated_passage_is_scored_at_its_second_reading(data: Path) -> None:
    """A model that says the token n places back with certainty, n the passage and the gap, saves all of the loss there."""
    shards = ShardSet(data, "valid")

    class Copier(OwnAdapter):
        vocab_size, device = 512, torch.device("cpu")

        def __init__(self) -> None:
            pass

        def stream(self, ids_BT: torch.Tensor, chunk: int, each: Callable[..., None], batch_state: Any = None) -> None:
            labels = ids_BT[:, 1:]
            nll = torch.full(labels.shape, 6.0)
            for period in (8, 8 + 16, 8 + 128):
                again = labels[:, period:] == labels[:, :-period]
                if bool(again[:, -8:].all()) and labels.shape[1] == period + 8:
                    nll[:, period:] = torch.where(again, 0.0, 6.0)
            each(0, nll, None)

    found = measure.repeated(Copier(), shards, 32, 4)
    assert [gap["gap"] for gap in found["gaps"]] == [0, 16, 128]
    assert all(gap["first"] == 6.0 and gap["again"] == 0.0 and gap["copied"] == 1.0 for gap in found["gaps"])


def test_intervals_are_students(data: Path) -> None:
    found = interval([1.0, 2.0, 4.0])
    assert found is not None
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(4.302653 * 1.527525 / math.sqrt(3), rel=1e-5)
    apart = difference({0: 1.0, 1: 2.0, 3: 9.0}, {0: 0.5, 1: 1.6, 2: 7.0})
    assert apart is not None and apart.n == 2 and apart.mean == pytest.approx(0.45) and not apart.decides()
    four = Interval(0.005, 3.182446 * 0.0057735 / 2, 4)
    assert four.seeds_for(0.02) == 4 and four.seeds_for(0.01) == 8
    assert 2 * 2.364624 * 0.0057735 / math.sqrt(8) < 0.01 < 2 * 2.446912 * 0.0057735 / math.sqrt(7)
    one = interval([3.0])
    assert one is not None and one.half == math.inf and not one.decides() and interval([]) is None
