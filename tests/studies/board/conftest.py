"""Shards and settings of a tiny board."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.corpus import Corpus
from scripts.board import __main__ as program
from scripts.board import corpus


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the tiny board: passages of the demo corpus."""
    folder = tmp_path_factory.mktemp("board")
    texts = [text[i : i + 30_000] for text in list(Corpus("demo", "text", False, 0, 0.01))[:12] for i in (0, 30_000)]
    texts += [texts[0] + texts[2]]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    random.Random(0).shuffle(texts)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert corpus.make(str(folder / "a.jsonl"), folder / "data", 512, 100_000) == 0
    return folder / "data"


@pytest.fixture
def values(data: Path, tmp_path: Path) -> dict[str, Any]:
    """What `run` hands to work, without a limit of time."""
    given = program.arguments(["run", f"data={data}", f"out={tmp_path / 'out'}", f"page={tmp_path / 'page'}", "size=tiny", "device=cpu"])[1]
    return given | {"until": 0.0, "environment": {}}
