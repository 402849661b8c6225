"""Where evaluations read their text: the held-out split of token shards, a text file, or the bundled public-domain books."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evals.adapters import Adapter, ItemError, TextCoder
from training.errors import UserError

DEMO = Path(__file__).resolve().parent.parent / "data" / "demo" / "demo_corpus.jsonl.xz"


class Text:
    """One long sequence of token ids; rows are cut from it at random offsets by seed. starts: where its documents begin."""

    def __init__(self, ids: np.ndarray, source: str, bytes_per_token: float | None = None, starts: list[int] | None = None) -> None:
        self.ids, self.source, self.bytes_per_token, self.starts = ids, source, bytes_per_token, starts or [0]

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        """(count, length) int64 from random offsets; a row longer than the text goes round to its beginning."""
        n = len(self.ids)
        if n < 2:
            raise ItemError(f"{self.source} has no text to evaluate on.")
        offsets = np.random.default_rng([seed, length]).integers(0, max(1, n - length), count)
        index = (offsets[:, None] + np.arange(length)) % n
        return np.asarray(self.ids[index] if length < n else np.take(self.ids, index)).astype(np.int64)

    def documents(self, count: int, length: int, decode: Callable[[list[int]], str]) -> list[tuple[np.ndarray, int]]:
        """(ids (n+1,), bytes of all but the first) of `count` documents, evenly from all of them, each cut to `length` + 1 ids. Where there
        are fewer documents, they are cut into pieces of that length, and `count` pieces are taken evenly."""
        borders = [*self.starts, len(self.ids)]
        places = list(zip(borders, borders[1:]))
        if len(places) < count:
            places = [(a, end) for start, end in places for a in range(start, max(start + 1, end - 1), length)]
        found = []
        for i in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)):
            ids = np.asarray(self.ids[places[i][0] : min(places[i][1], places[i][0] + length + 1)]).astype(np.int64)
            found.append((ids, max(1, len(decode(ids[1:].tolist()).encode("utf-8", errors="replace")))))
        return found


def read_documents(path: Path, limit_bytes: int) -> list[str]:
    """Documents of a .txt, .jsonl or .jsonl.xz file ("text" fields), up to `limit_bytes` characters in all."""
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8", errors="replace") as file:
            if path.name.endswith((".jsonl", ".jsonl.xz")):
                documents, size = [], 0
                for line in file:
                    documents.append(str(json.loads(line)["text"])[: limit_bytes - size])
                    size += len(documents[-1])
                    if size >= limit_bytes:
                        break
                return documents
            return [file.read(limit_bytes)]
    except (OSError, ValueError, KeyError, lzma.LZMAError) as error:
        raise UserError(f"The text {path} cannot be read: {error}.") from error


def text_of(coder: TextCoder, path: Path, limit_bytes: int = 8_000_000) -> Text:
    """Tokenised documents, each with the model's start token before it."""
    documents = read_documents(path, limit_bytes)
    ids: list[int] = []
    starts = []
    for document in documents:
        starts.append(len(ids))
        ids += coder.encode(document, start=True)
    return Text(np.array(ids, dtype=np.int64), path.name, sum(len(d.encode()) for d in documents) / max(1, len(ids)), starts)


def open_text(adapter: Adapter, data: str | None, text: str | None, run_data: Any = None) -> Text:
    """data: a shard folder (its held-out split); text: a file; neither: the run's own held-out split, else the bundled books."""
    if text is not None:
        return text_of(adapter.need_coder(), Path(text))
    folder = data or (run_data if isinstance(run_data, str) and Path(run_data).is_dir() else None)
    if folder is None:
        return text_of(adapter.need_coder(), DEMO)
    from data.shards import ShardSet

    try:
        shards = ShardSet(folder, "valid")
    except ValueError as error:
        raise UserError(str(error)) from error
    if shards.vocab_size > adapter.vocab_size:
        raise UserError(
            f"The shards in {folder} have {shards.vocab_size:,} token kinds, the model {adapter.vocab_size:,}; give shards of its own tokenizer or text=FILE."
        )
    ids = np.asarray(shards.read(0, shards.n_tokens))
    starts = [0, *(np.flatnonzero(np.diff(shards.document_of(np.arange(shards.n_tokens)))) + 1).tolist()]
    return Text(ids, f"{folder} (held out)", shards.n_bytes / shards.n_tokens, starts)


def constant_rows(adapter: Adapter, count: int, length: int, text: str = "\n") -> np.ndarray:
    """One token repeated (a run of newlines may be merged by a tokenizer; a repeated id is not)."""
    ids = adapter.coder.encode(text) if adapter.coder is not None else [1]
    start = adapter.coder.start_ids[:1] if adapter.coder is not None else []
    row = np.full((count, length), ids[0] if ids else 1, dtype=np.int64)
    row[:, : len(start)] = start
    return row


def random_rows(adapter: Adapter, count: int, length: int, seed: int) -> np.ndarray:
    """Ids drawn uniformly from the vocabulary, special tokens left out."""
    special = adapter.coder.special_ids if adapter.coder is not None else set()
    known = adapter.coder.tokenizer.get_vocab_size() if adapter.coder is not None else adapter.vocab_size
    allowed = np.array([i for i in range(min(known, adapter.vocab_size)) if i not in special], dtype=np.int64)
    return allowed[np.random.default_rng([seed, length]).integers(0, len(allowed), (count, length))]
