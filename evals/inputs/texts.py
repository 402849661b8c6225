"""Where evaluations read their text: one corpus for all models of an evaluation, which each of them reads in its own tokens.

corpus = corpus_of_file("books.jsonl.gz")        # what data.prepare reads; or corpus_of_shards(DIR): the held-out split; or corpus_of_file("demo")
text = tokenised(corpus, adapter)
count, length = text.fitting(16, 65537)          # what the text gives without repeating itself
ids = text.rows(count, length, seed=0)           # rows do not overlap
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.byte_counts import bytes_of
from data.encode import Encoder, batches
from data.not_kept import REWRITTEN
from data.shards import ShardSet
from data.sources import DEMO as DEMO
from data.sources import Source
from data.tokenizer import Marks, TextCoder, unknown_id
from evals.adapters.base import Adapter, ItemError
from training.errors import UserError

LIMIT = 16_000_000  # characters of a text that are read


@dataclass
class Corpus:
    """Documents as text, the same for every model. name: what a report calls it; note: what was left out of it; shards: where it comes from, if from shards."""

    name: str
    documents: list[str]
    note: str = ""
    shards: ShardSet | None = None

    def __post_init__(self) -> None:
        digest, self.bytes = hashlib.sha256(), 0
        for document in self.documents:
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
            self.bytes += len(data)
        self.sha256 = digest.hexdigest()

    def excerpts(self, count: int, characters: int) -> list[str]:
        """The beginnings, `characters` long, of `count` documents, evenly from all of them; of fewer documents, `count` pieces of that length, evenly
        from all of them. They are the same for every model, whatever its tokens are."""
        parts = [d[:characters] for d in self.documents]
        if len(parts) < count:
            parts = [d[a : a + characters] for d in self.documents for a in range(0, len(d), characters)]
        chosen = np.linspace(0, max(0, len(parts) - 1), min(count, len(parts))).round().astype(int)
        return [parts[i] for i in np.unique(chosen)]

    def to_dict(self) -> dict[str, Any]:
        """What a result says of its text."""
        return {"name": self.name, "sha256": self.sha256, "documents": len(self.documents), "bytes": self.bytes, "note": self.note}


class Text:
    """A corpus in a model's tokens, as one long sequence of ids. starts: where its documents begin; unknown: the token that stands for what the model has
    no token for, None where there is none; told: the share of the text's bytes that the ids stand for, above 1 where the tokenizer adds some."""

    def __init__(
        self,
        ids: np.ndarray,
        source: str,
        bytes_per_token: float | None = None,
        starts: list[int] | None = None,
        unknown: int | None = None,
        told: float = 1.0,
    ) -> None:
        self.ids, self.source, self.bytes_per_token, self.starts = ids, source, bytes_per_token, starts or [0]
        self.told = told
        self.lost = 0.0 if unknown is None or not len(ids) else float((ids == unknown).mean())  # share of the tokens

    @property
    def note(self) -> str:
        """What a result on this text has to say of its tokens; '' for one of which nothing was lost or written otherwise."""
        if self.lost:
            return f"{self.lost:.1%} of the text's tokens are the unknown one, whose text is lost: bits per byte look better than they are"
        if abs(self.told - 1) >= REWRITTEN:
            return f"the tokens stand for {self.told:.1%} of the text's bytes, by which bits per byte divide: the tokenizer writes it otherwise"
        return ""

    def fitting(self, count: int, length: int) -> tuple[int, int]:
        """(rows, tokens of a row) nearest to `count` rows of `length` that the text gives without any token in two of them."""
        n = len(self.ids)
        if n < 2:
            raise ItemError(f"{self.source} has no text to evaluate on.")
        length = min(length, n)
        return max(1, min(count, n // length)), length

    def rows(self, count: int, length: int, seed: int) -> np.ndarray:
        """(count, length) int64, one row from each of `count` equal parts of the text, at a place drawn from the seed: no token is in two rows.
        Raises ItemError where the text is too short for that."""
        n = len(self.ids)
        if n < 2 or count * length > n:
            raise ItemError(
                f"{self.source} has {n:,} tokens, too few for {count} row(s) of {length:,} without repeating it; ask for shorter or fewer rows, or give a longer text."
            )
        part = n // count
        offsets = np.arange(count) * part + np.random.default_rng([seed, length]).integers(0, part - length + 1, count)
        return np.stack([np.asarray(self.ids[start : start + length]) for start in offsets.tolist()]).astype(np.int64)

    def documents(self, count: int, length: int, coder: TextCoder) -> list[tuple[np.ndarray, int]]:
        """(ids (n+1,), bytes of all but the first) of `count` documents, evenly from all of them, each cut to `length` + 1 ids. Where there
        are fewer documents, they are cut into pieces of that length, and `count` pieces are taken evenly."""
        borders = [*self.starts, len(self.ids)]
        places = list(zip(borders, borders[1:]))
        if len(places) < count:
            places = [(a, end) for start, end in places for a in range(start, max(start + 1, end - 1), length)]
        cut = []
        for i in np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)):
            ids = np.asarray(self.ids[places[i][0] : min(places[i][1], places[i][0] + length + 1)]).astype(np.int64)
            cut.append((ids, max(1, bytes_of(coder.tokenizer, ids, [*coder.start_ids, *coder.end_ids]))))
        return cut


def corpus_of_file(path: str | Path, limit: int = LIMIT) -> Corpus:
    """The documents of a file, a folder of files, or `demo` (the bundled books), read as data.prepare reads them. Raises UserError where
    there is none, or what is there is no text."""
    source, documents, size, cut, zeros = Source(str(path)), [], 0, False, False
    try:
        for document in source:
            if zeros := "\0" in document:
                break
            cut = size + len(document) > limit
            documents.append(document[: limit - size])
            size += len(documents[-1])
            if size >= limit:
                break
    except UserError as error:
        raise UserError(f"The text {path} cannot be read: {str(error).replace('input=', 'text=')}") from error
    if zeros:
        raise UserError(f"The text {path} holds zero bytes, so it is no text; give text in UTF-8, or in UTF-16 with its byte order mark.")
    left_out = ", ".join(f"{n:,} {kind}" for kind, n in source.bad.items())
    if not documents:
        raise UserError(f"The text {path} holds no document that can be read{f' ({left_out})' if left_out else ''}; give text in UTF-8.")
    notes = [f"its first {limit:,} characters"] if cut else []
    name = "the bundled books" if str(path) in ("demo", str(DEMO)) else Path(path).name
    return Corpus(name, documents, ", ".join([*notes, *([f"left out: {left_out}"] if left_out else [])]))


def corpus_of_shards(folder: str, limit: int = LIMIT) -> Corpus:
    """The held-out split of token shards as text; of several folders, with commas between them, an equal part each. A folder that has none is named
    in the note. Raises UserError where no folder has one."""
    documents: list[str] = []
    opened: list[ShardSet] = []
    notes: list[str] = []
    size, folders = 0, [part for part in folder.split(",") if part]
    for number, part in enumerate(folders, 1):
        try:
            shards = ShardSet(part, "valid")
            coder, room = shards.coder(), limit * number // len(folders)
            for i in range(shards.n_documents):
                if size >= room:
                    notes.append(f"the first {i:,} of {shards.n_documents:,} documents of {part}")
                    break
                ids, _ = shards.document(i)
                documents.append(coder.decode(ids.tolist())[: room - size])
                size += len(documents[-1])
            opened.append(shards)
        except UserError as error:
            if len(folders) == 1:
                raise
            notes.append(f"nothing of {part}: {str(error).rstrip('.')}")
    if not opened:
        raise UserError(f"No folder of {folder} has a held-out split; prepare one with valid_fraction above zero.")
    name = " and ".join(f"the valid split of {shards.directory}" for shards in opened)
    return Corpus(name, [d for d in documents if d], ", ".join(notes), opened[0] if len(folders) == 1 else None)


def tokenised(corpus: Corpus, adapter: Adapter) -> Text:
    """The corpus in the model's tokens, each document with the model's start token before it. A model without a tokenizer reads shards as they are."""
    if adapter.coder is None and corpus.shards is not None:
        return _ids_of_shards(corpus.shards, adapter)
    coder = adapter.need_coder()
    encoder = Encoder(coder.tokenizer, Marks(coder.start_ids[0] if coder.start_ids else None))  # as coder.encode, on all cores
    ids = [part for group in batches(iter(corpus.documents)) for part in encoder.encode(group)]
    whole = np.concatenate(ids).astype(np.int64)
    starts = np.cumsum([0, *map(len, ids[:-1])]).tolist()
    marks = [*coder.start_ids, *coder.end_ids]
    told = bytes_of(coder.tokenizer, whole, marks) / max(1, corpus.bytes) if coder.start_ids else 1.0  # else the first token is not counted
    return Text(whole, corpus.name, corpus.bytes / max(1, len(whole)), starts, unknown_id(coder.tokenizer, marks), told)


def _ids_of_shards(shards: ShardSet, adapter: Adapter) -> Text:
    if shards.vocab_size > adapter.vocab_size:
        raise UserError(
            f"The shards in {shards.directory} have {shards.vocab_size:,} token kinds, the model {adapter.vocab_size:,}; give shards of its own tokenizer or text=FILE."
        )
    return held_out_text(shards)


def held_out_text(shards: ShardSet) -> Text:
    """The tokens of a split as they are."""
    ids = np.asarray(shards.read(0, shards.n_tokens))
    starts = [0, *(np.flatnonzero(np.diff(shards.document_of(np.arange(shards.n_tokens)))) + 1).tolist()]
    return Text(ids, f"the {shards.split} split of {shards.directory}", shards.n_bytes / shards.n_tokens, starts)


def open_corpus(data: str | None, text: str | None) -> Corpus:
    """text: a file; data: a shard folder (its held-out split); neither: the bundled books."""
    if text is not None:
        return corpus_of_file(text)
    return corpus_of_shards(data) if data else corpus_of_file("demo")


def open_text(adapter: Adapter, data: str | None, text: str | None) -> Text:
    """The text of `open_corpus` in the model's tokens."""
    return tokenised(open_corpus(data, text), adapter)


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
