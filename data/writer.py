"""Writes token shards so that an interrupted preparation goes on where it stopped and ends in the same bytes.

Everything happens in FOLDER.partial; a journal there says how many documents are safely on disk and how long each file was then.
Resuming cuts the files back to those lengths. The finished folder appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import UserError

ENDINGS = (".bin", ".idx", ".len")
BLOCK = 1 << 22  # tokens looked at together
TEMPORARY = "written.tmp"  # of a small file, until it has its name
TOGETHER = "together.json"  # the side, and the digest, of a document that goes there with all of its copies


@dataclass
class Split:
    """Progress of one split: finished shards, and tokens, documents and bytes of the open one and in all."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    open_tokens: int = 0
    open_documents: int = 0
    open_bytes: int = 0
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    last_document: list[int] = field(default_factory=lambda: [0, 0])  # tokens and bytes of the newest one

    def count(self, tokens: int, documents: int, size: int) -> None:
        self.open_tokens, self.open_documents, self.open_bytes = (
            self.open_tokens + tokens,
            self.open_documents + documents,
            self.open_bytes + size,
        )
        self.tokens, self.documents, self.bytes = self.tokens + tokens, self.documents + documents, self.bytes + size


class ShardWriter:
    """Appends documents to the shards of both splits under `folder`, a `.partial` one."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype.newbyteorder("<"), shard_tokens
        self.files: dict[str, list[IO[bytes]]] = {}
        self._begin()

    def _begin(self) -> None:
        self.splits = {"train": Split(), "valid": Split()}
        self.digests: dict[str, Any] = {}
        self.consumed = 0

    def resume(self) -> bool:
        """Takes up what the journal says; False when there is none. Raises UserError when files are shorter than it says."""
        try:
            journal = json.loads((self.folder / "journal.json").read_text())
        except (OSError, ValueError):
            return False
        self.close_files()
        self.splits = {name: Split(**values) for name, values in journal["splits"].items()}
        self.consumed = journal["consumed"]
        for name, split in self.splits.items():
            for shard in split.shards:
                self._cut(shard["file"], shard["tokens"], shard["documents"])
            if split.open_documents:
                self._cut(self._base(name), split.open_tokens, split.open_documents)
                self.digests[name] = _digest(self.folder / f"{self._base(name)}.bin")
        return True

    def _cut(self, base: str, tokens: int, documents: int) -> None:
        for ending, size in zip(ENDINGS, (tokens * self.dtype.itemsize, documents * 8, documents * 8)):
            path = self.folder / f"{base}{ending}"
            if not path.exists() or path.stat().st_size < size:
                raise UserError(f"{path} is damaged, so the interrupted run cannot go on; delete {self.folder} and start again.")
            if path.stat().st_size > size:
                os.truncate(path, size)

    def _base(self, name: str) -> str:
        return f"{name}-{len(self.splits[name].shards):05d}"

    def add(self, name: str, tokens: np.ndarray, size: int) -> None:
        """Appends one document (its end-of-text mark first) of `size` UTF-8 bytes to split `name`."""
        self.extend(name, [tokens], [size])

    def extend(self, name: str, documents: list[np.ndarray], sizes: list[int]) -> None:
        """Appends documents; a shard ends after the document that brings it to `shard_tokens`."""
        split, ends = self.splits[name], np.cumsum([len(d) for d in documents])
        first = 0
        while first < len(documents):
            before = int(ends[first - 1]) if first else 0
            last = min(len(documents), int(np.searchsorted(ends, before + self.shard_tokens - split.open_tokens)) + 1)
            tokens = np.concatenate(documents[first:last]).astype(self.dtype)
            starts = split.open_tokens + np.concatenate([[0], ends[first : last - 1] - before])
            data = tokens.tobytes()
            self._write(name, (data, starts.astype("<u8").tobytes(), np.array(sizes[first:last], "<u8").tobytes()))
            self.digests[name].update(data)
            split.count(len(tokens), last - first, sum(sizes[first:last]))
            split.last_document = [len(documents[last - 1]), sizes[last - 1]]
            if split.open_tokens >= self.shard_tokens:
                self._close_shard(name)
            first = last

    def _write(self, name: str, blocks: tuple[bytes, ...]) -> None:
        if name not in self.files:
            mode = "ab" if self.splits[name].open_documents else "wb"
            self.files[name] = [open(self.folder / f"{self._base(name)}{ending}", mode) for ending in ENDINGS]
            if mode == "wb":
                self.digests[name] = hashlib.sha256()
        for file, block in zip(self.files[name], blocks):
            file.write(block)

    def _close_shard(self, name: str) -> None:
        split, base = self.splits[name], self._base(name)
        for file in self.files.pop(name, ()):
            _sync(file)
            file.close()
        if split.open_documents:
            split.shards.append(
                {
                    "file": base,
                    "tokens": split.open_tokens,
                    "documents": split.open_documents,
                    "bytes": split.open_bytes,
                    "sha256": self.digests.pop(name).hexdigest(),
                }
            )
        split.open_tokens = split.open_documents = split.open_bytes = 0

    def close_files(self) -> None:
        for files in self.files.values():
            for file in files:
                file.close()
        self.files.clear()

    def commit(self, consumed: int) -> None:
        """Makes everything so far durable: files first, then the journal by rename."""
        self.consumed = consumed
        for files in self.files.values():
            for file in files:
                _sync(file)
        splits = {name: asdict(split) for name, split in self.splits.items()}
        self._put("journal.json", json.dumps({"consumed": consumed, "splits": splits}))

    def _put(self, name: str, text: str) -> None:
        """A small file that is whole, on disk, or as it was before."""
        temporary = self.folder / TEMPORARY
        with temporary.open("w") as file:
            file.write(text)
            _sync(file)
        os.replace(temporary, self.folder / name)

    def move_newest(self, source: str, target: str) -> None:
        """Moves the last document of `source` to `target`. A kill at any moment leaves it on exactly one side."""
        self.commit(self.consumed)
        split, tokens = self.splits[source], self.newest(source)
        if not split.open_documents:  # the newest document closed its shard: that is open again
            shard = split.shards.pop()
            split.open_tokens, split.open_documents, split.open_bytes = shard["tokens"], shard["documents"], shard["bytes"]
        n, size = split.last_document
        split.count(-n, -1, -size)
        self.extend(target, [tokens], [size])
        self.commit(self.consumed)  # the one moment from which the document counts as moved
        self.resume()  # cuts it off where it was

    def newest(self, name: str) -> np.ndarray:
        """The tokens of the last document of a split that has one."""
        return np.array(next(self._from_the_end(name)))

    def copies_of_newest(self, name: str) -> int:
        """How many documents of a split have the tokens of its last one, which is counted too."""
        newest = self.newest(name)
        return sum(np.array_equal(tokens, newest) for tokens in self._from_the_end(name))

    def occurrences(self, token: int) -> int:
        """How often a token stands in what has been committed."""
        return sum(int(np.count_nonzero(block[1:] == token)) for block in self.blocks())

    def blocks(self) -> Iterator[np.ndarray]:
        """What has been committed, piece by piece; the first token of each is what stands before it, the mark of a document where a shard begins."""
        for name in self.splits:
            for base, n, _ in self._committed(name):
                tokens = np.memmap(self.folder / f"{base}.bin", self.dtype, "r", shape=(n,))
                for first in range(0, max(1, n - 1), BLOCK):
                    yield tokens[first : first + BLOCK + 1]

    def _committed(self, name: str) -> list[tuple[str, int, int]]:
        """(file without its ending, tokens, documents) of each shard of a split."""
        split = self.splits[name]
        shards = [(shard["file"], shard["tokens"], shard["documents"]) for shard in split.shards]
        return shards + ([(self._base(name), split.open_tokens, split.open_documents)] if split.open_documents else [])

    def _from_the_end(self, name: str) -> Iterator[np.ndarray]:
        """The tokens of each document, the last one first, of what has been committed."""
        for base, n, documents in reversed(self._committed(name)):
            tokens = np.memmap(self.folder / f"{base}.bin", self.dtype, "r", shape=(n,))
            starts = np.fromfile(self.folder / f"{base}.idx", "<u8", documents).astype(np.int64)
            for start, end in reversed(list(zip(starts, [*starts[1:], n]))):
                yield tokens[start:end]

    def together(self) -> tuple[str, str] | None:
        """The side and the digest of the document that goes there with all of its copies, where that was settled."""
        try:
            side, digest = json.loads((self.folder / TOGETHER).read_text())
        except (OSError, ValueError):
            return None
        return side, digest

    def start_again(self, side: str, digest: str) -> None:
        """Forgets all that was written, and settles to which side a document and its copies go. A kill in between: as if nothing had been."""
        self.close_files()
        (self.folder / "journal.json").unlink()
        self._put(TOGETHER, json.dumps([side, digest]))
        self._begin()

    def finish(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Closes the shards and writes meta.json last; returns it. `publish` then gives the folder its name."""
        for name in self.splits:
            self._close_shard(name)
        splits = {
            name: {"tokens": s.tokens, "documents": s.documents, "bytes": s.bytes, "shards": s.shards} for name, s in self.splits.items()
        }
        listed_files = {f"{shard['file']}{ending}" for split in self.splits.values() for shard in split.shards for ending in ENDINGS}
        for path in self.folder.iterdir():  # what a killed run or a moved document left
            if path.suffix in ENDINGS and path.name not in listed_files:
                path.unlink()
        content = {**meta, "dtype": self.dtype.name, "splits": splits}
        same = {key: content.get(key) for key in ("format", "dtype", "vocab_size", "eot_id", "tokenizer_sha256", "splits")}
        same |= {"end_id": content["end_id"]} if "end_id" in content else {}
        content["fingerprint"] = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()  # of the tokens, not of paths
        self._put("meta.json", json.dumps(content, indent=1) + "\n")
        return content


def publish(partial: Path, final: Path) -> None:
    """Renames a folder with meta.json to `final`, in place of one that may be there."""
    for name in ("journal.json", "identity.json", TOGETHER, TEMPORARY):
        (partial / name).unlink(missing_ok=True)
    old = final.with_name(final.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def digest_of(tokens: np.ndarray) -> str:
    """Of a document's tokens, whatever their dtype."""
    return hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _digest(path: Path) -> Any:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest
