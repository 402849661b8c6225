"""Token shards on disk: written once, read by memory map.

A folder holds meta.json, tokenizer.json and per split `train-00000.bin` (token ids) with `train-00000.idx` (uint64: where each document starts,
in tokens). Every document is the end-of-text mark followed by its tokens, so the label of a document's last token is the next one's mark.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.tokenizer import fingerprint

FORMAT = 1
SPLITS = ("train", "valid")


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json of a shard folder. Raises ValueError in one sentence."""
    try:
        meta = json.loads((directory / "meta.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{directory} holds no token shards; make them with: python -m data.prepare input=demo out={directory} tokenizer=bpe:2048"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory / 'meta.json'} cannot be read ({error}); prepare the data again.") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{directory} is of format {meta.get('format')}, this program reads {FORMAT}; prepare the data again.")
    return meta


class ShardSet:
    """One split of a shard folder as one long array of tokens. Raises ValueError on opening when a file is missing or cut short."""

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory, self.split = Path(directory), split
        self.meta = read_meta(self.directory)
        if split not in self.meta["splits"]:
            raise ValueError(f"{self.directory} has no split {split!r}.")
        part = self.meta["splits"][split]
        self.dtype = np.dtype(self.meta["dtype"])
        self.n_tokens, self.n_documents, self.n_bytes = part["tokens"], part["documents"], part["bytes"]
        self.vocab_size, self.eot_id = self.meta["vocab_size"], self.meta["eot_id"]
        self.tokenizer_sha256, self.fingerprint = self.meta["tokenizer_sha256"], self.meta["fingerprint"]
        if self.n_tokens < 2:
            raise ValueError(f"{self.directory} has no {split} tokens; prepare it with more text.")
        self._bins = [self._map(s["file"] + ".bin", s["tokens"], self.dtype) for s in part["shards"]]
        self._starts = np.cumsum([0, *(s["tokens"] for s in part["shards"])])
        self._index = [self._map(s["file"] + ".idx", s["documents"], np.dtype("<u8")) for s in part["shards"]]
        if fingerprint(self.tokenizer()) != self.tokenizer_sha256:
            raise ValueError(
                f"{self.directory / 'tokenizer.json'} is not the tokenizer these shards were made with; put the right one back or prepare the data again."
            )

    def _map(self, name: str, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        path = self.directory / name
        size = path.stat().st_size if path.exists() else -1
        if size != count * dtype.itemsize:
            what = "is missing" if size < 0 else f"has {size:,} bytes instead of {count * dtype.itemsize:,}"
            raise ValueError(f"The shard {path} {what}; copy it again or prepare the data again.")
        return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype)

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(str(self.directory / "tokenizer.json"), (self.directory / "tokenizer.json").stat().st_mtime_ns)

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start+n-1 of the split, across shard borders; a view of the map where it can be."""
        if start < 0 or n < 0 or start + n > self.n_tokens:
            raise ValueError(f"Tokens {start} to {start + n} are outside the {self.n_tokens} of {self.directory} ({self.split}).")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while n > 0:
            offset = start - int(self._starts[first])
            piece = self._bins[first][offset : offset + n]
            pieces.append(piece)
            start, n, first = start + len(piece), n - len(piece), first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.zeros(0, self.dtype)

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """int64 token offset of every document, in order."""
        return np.concatenate([index.astype(np.int64) + int(start) for index, start in zip(self._index, self._starts)])

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, its end-of-text mark first."""
        if not 0 <= i < self.n_documents:
            raise ValueError(f"There are {self.n_documents} documents in {self.directory} ({self.split}), not {i + 1}.")
        start = int(self.document_starts[i])
        end = int(self.document_starts[i + 1]) if i + 1 < self.n_documents else self.n_tokens
        return self.read(start, end - start)


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str, changed: int) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} cannot be read: {error}.") from error
