"""Token shards on disk: written once, read by position (data/parts.py).

A folder holds meta.json, tokenizer.json and per split `train-00000.bin` (token ids) with `train-00000.idx` (uint64: where each document
starts, in tokens of that shard) and `train-00000.len` (uint64: its length as UTF-8). Every document is the mark that starts it (eot_id) followed
by its tokens (and by end_id where the tokenizer has a mark of its own for that), so the label of a document's last token is the next one's mark.
Dimensions: R rows, L tokens of a row.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.errors import UserError
from data.parts import Files, Index, Numbers
from data.tokenizer import Marks, TextCoder, coder_of, file_fingerprint, tokenizer_config

FORMAT = 1
SPLITS = ("train", "valid")
OFFSETS = np.dtype("<u8")


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a shard folder. Raises UserError in one sentence."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        text = directory.is_file() or directory.is_dir() and any(directory.iterdir())
        out = f"runs/data/{directory.name.split('.')[0] or 'mine'}" if text else directory
        how = f"input={directory if text else 'demo'} out={out} tokenizer=bpe:2048{f', then give data.path={out}' if text else ''}"
        raise UserError(f"{directory} holds no token shards; make them with: python -m data.prepare {how}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / 'meta.json'} cannot be read ({error}); prepare the data again.") from None
    version = meta.get("format") if isinstance(meta, dict) else None
    if version != FORMAT:
        raise UserError(f"{directory} is of format {version}, this program reads {FORMAT}; prepare the data again.")
    return meta


def open_held_out(directory: str | Path) -> ShardSet | None:
    """The held-out split of a shard folder, or None where it has none. Raises UserError when it has one that cannot be read."""
    part = read_meta(Path(directory)).get("splits", {}).get("valid") or {}
    return ShardSet(directory, "valid") if part.get("tokens", 0) >= 2 else None


class ShardSet:
    """One split of a shard folder as one long array of tokens. Raises UserError on opening when a file is missing or cut short."""

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory, self.split = Path(directory), split
        self.meta = read_meta(self.directory)
        try:
            if split not in self.meta["splits"]:
                raise UserError(f"{self.directory} has no split {split!r}.")
            part = self.meta["splits"][split]
            self.dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
            self.n_tokens, self.n_documents, self.n_bytes = part["tokens"], part["documents"], part["bytes"]
            self.vocab_size, self.eot_id = self.meta["vocab_size"], self.meta["eot_id"]
            self.tokenizer_sha256, self.fingerprint = self.meta["tokenizer_sha256"], self.meta["fingerprint"]
            self.shards: list[dict[str, Any]] = part["shards"]
            tokens, documents = [s["tokens"] for s in self.shards], [s["documents"] for s in self.shards]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.directory / 'meta.json'} lacks {error}; prepare the data again.") from None
        if self.n_tokens < 2:
            what = (
                "no held-out documents; prepare it with valid_fraction above zero or more text"
                if split == "valid"
                else "no tokens; prepare it with more text"
            )
            raise UserError(f"{self.directory} has {what}.")
        self.files = files = Files()
        self._bins = [Numbers(files, self._path(s, ".bin"), s["tokens"], self.dtype) for s in self.shards]
        self._index = [Index(files, self._path(s, ".idx"), s["documents"], OFFSETS) for s in self.shards]
        self._lengths = [Numbers(files, self._path(s, ".len"), s["documents"], OFFSETS) for s in self.shards if "bytes" in s]
        self._first_token = list(itertools.accumulate(tokens, initial=0))  # of every shard, and the end
        self._first_document = list(itertools.accumulate(documents, initial=0))
        if file_fingerprint(self.directory / "tokenizer.json") != self.tokenizer_sha256:
            raise UserError(
                f"{self.directory / 'tokenizer.json'} is not the tokenizer these shards were made with; put the right one back or prepare the data again."
            )

    def _path(self, shard: dict[str, Any], ending: str) -> Path:
        return self.directory / (shard["file"] + ending)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with."""
        return _tokenizer(str(self.directory / "tokenizer.json"), (self.directory / "tokenizer.json").stat().st_mtime_ns)

    @property
    def marks(self) -> Marks:
        """The tokens around each document."""
        return Marks(self.eot_id, self.meta.get("end_id"))

    def coder(self) -> TextCoder:
        """Text to ids as these documents were encoded."""
        return coder_of(self.tokenizer(), marks=self.marks)

    def tokenizer_config(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the tokenizer to know how documents begin."""
        return tokenizer_config(self.tokenizer(), self.marks)

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start+n-1 of the split, across shard borders. Raises UserError when a file was cut or lost since it was opened."""
        self._check(start, start, n)
        shard = bisect.bisect_right(self._first_token, start) - 1
        pieces = []
        while n > 0:
            offset = start - self._first_token[shard]
            piece = self._piece(shard, offset, n)
            pieces.append(piece)
            start, n, shard = start + len(piece), n - len(piece), shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    def _piece(self, shard: int, offset: int, n: int) -> np.ndarray:
        """Up to n tokens of one shard. Raises UserError where one is beyond the vocabulary: an embedding would read past its end."""
        piece = self._bins[shard].read(offset, min(n, self._bins[shard].count - offset))
        if len(piece) and piece.max() >= self.vocab_size:
            place = int((piece >= self.vocab_size).argmax())
            raise UserError(
                f"{self._bins[shard].path} holds the token {piece[place]} at place {offset + place:,}, beyond the {self.vocab_size:,} of its "
                "vocabulary: the file is damaged; copy it again or prepare the data again."
            )
        return piece

    def _check(self, low: int, high: int, n: int) -> None:
        if low < 0 or n < 0 or high + n > self.n_tokens:
            raise ValueError(f"Tokens {low} to {high + n} are outside the {self.n_tokens} of {self.directory} ({self.split}).")

    def rows(self, start_R: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens (R, n) int64, segment ids (R, n) int32) of the rows that begin at `start_R`; a row's first document is segment 0."""
        starts = [int(s) for s in start_R]
        if starts:
            self._check(min(starts), max(starts), n)
        tokens_RL, segments_RL = np.empty((len(starts), n), np.int64), np.zeros((len(starts), n), np.int32)
        for tokens_L, segments_L, start in zip(tokens_RL, segments_RL, starts):
            shard, done = bisect.bisect_right(self._first_token, start) - 1, 0
            while done < n:
                offset = start + done - self._first_token[shard]
                piece = self._piece(shard, offset, n - done)
                tokens_L[done : done + len(piece)] = piece
                begun = (self._index[shard].between(offset, offset + len(piece)) - np.uint64(offset)).astype(np.int64)
                if len(begun) and (begun.min() < 0 or begun.max() >= len(piece) or (piece[begun] != self.eot_id).any()):
                    raise _damaged(self._index[shard].path)
                segments_L[begun + done] = 1
                done, shard = done + len(piece), shard + 1
        if n:
            segments_RL[:, 0] = 0
        return tokens_RL, np.cumsum(segments_RL, axis=1, dtype=np.int32)

    def document_of(self, token: int | np.ndarray) -> np.ndarray:
        """Number (int64) of the document that holds each token position."""
        tokens = np.atleast_1d(np.asarray(token, dtype=np.int64))
        shards = np.searchsorted(self._first_token, tokens, side="right") - 1
        result = np.empty_like(tokens)
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            result[chosen] = self._first_document[shard] + self._index[shard].holder(tokens[chosen] - self._first_token[shard])
        return result

    def document(self, i: int) -> tuple[np.ndarray, int]:
        """(tokens of document i, its end-of-text mark first; its length in UTF-8 bytes)."""
        if not 0 <= i < self.n_documents:
            raise ValueError(f"{self.directory} ({self.split}) has documents 0 to {self.n_documents - 1}, not {i}.")
        if len(self._lengths) != len(self.shards):
            raise UserError(f"{self.directory} does not say how long its documents are; prepare the data again.")
        shard = bisect.bisect_right(self._first_document, i) - 1
        place, index, tokens = i - self._first_document[shard], self._index[shard], self._bins[shard]
        start, end = index.at(place), index.at(place + 1) if place + 1 < index.count else tokens.count
        if not start < end <= tokens.count or (document := tokens.read(start, end - start))[0] != self.eot_id:
            raise _damaged(index.path)
        return document, self._lengths[shard].at(place)

    def verify(self) -> None:
        """Reads every file and compares it with what was written: tokens with their checksum, starts of documents with the marks that stand there,
        lengths with their sum. Raises UserError at the first that differs."""
        for number, shard in enumerate(self.shards):
            tokens, index, digest, place = self._bins[number], self._index[number], hashlib.sha256(), 0
            starts = index.read(0, index.count)
            sound = starts[0] == 0 and starts[-1] < tokens.count and bool((starts[1:] > starts[:-1]).all())
            while place < tokens.count:
                block = tokens.read(place, min(1 << 21, tokens.count - place))
                digest.update(block.tobytes())
                if sound:
                    low, high = starts.searchsorted(np.array([place, place + len(block)], OFFSETS))
                    sound = bool((block[(starts[low:high] - np.uint64(place)).astype(np.int64)] == self.eot_id).all())
                place += len(block)
            if shard.get("sha256", digest.hexdigest()) != digest.hexdigest():
                raise _damaged(tokens.path)
            if not sound:
                raise _damaged(index.path)
            if len(self._lengths) == len(self.shards) and int(self._lengths[number].read(0, index.count).sum()) != shard["bytes"]:
                raise _damaged(self._lengths[number].path)


def _damaged(path: Path) -> UserError:
    return UserError(f"The shard {path} is damaged; copy it again or prepare the data again (python -m data.verify looks at all of it).")


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str, changed: int) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path} cannot be read: {error}.") from error
