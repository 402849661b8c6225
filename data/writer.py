"""Writes token shards so that an interrupted preparation goes on where it stopped and ends in the same bytes.

Everything happens in FOLDER.partial; a journal there says how many documents are safely on disk and how long each file was then.
Resuming cuts the files back to those lengths. The finished folder appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np


@dataclass
class Split:
    """Progress of one split: finished shards, and tokens, documents and bytes of the open one and in all."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    open_tokens: int = 0
    open_documents: int = 0
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    last_document: list[int] = field(default_factory=lambda: [0, 0])  # tokens and bytes of the newest one


class ShardWriter:
    """Appends documents to the shards of both splits under `folder`, a `.partial` one."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.splits = {"train": Split(), "valid": Split()}
        self.files: dict[str, tuple[IO[bytes], IO[bytes]]] = {}
        self.consumed = 0

    def resume(self) -> bool:
        """Takes up what the journal says; False when there is none."""
        try:
            journal = json.loads((self.folder / "journal.json").read_text())
        except (OSError, ValueError):
            return False
        self.splits = {name: Split(**values) for name, values in journal["splits"].items()}
        self.consumed = journal["consumed"]
        for name, split in self.splits.items():
            if split.open_documents:
                base = self._base(name)
                os.truncate(self.folder / f"{base}.bin", split.open_tokens * self.dtype.itemsize)
                os.truncate(self.folder / f"{base}.idx", split.open_documents * 8)
        return True

    def _base(self, name: str) -> str:
        return f"{name}-{len(self.splits[name].shards):05d}"

    def add(self, name: str, tokens: np.ndarray, size: int) -> None:
        """Appends one document (its end-of-text mark first) of `size` UTF-8 bytes to split `name`."""
        split = self.splits[name]
        if name not in self.files:
            mode = "ab" if split.open_documents else "wb"
            self.files[name] = (open(self.folder / f"{self._base(name)}.bin", mode), open(self.folder / f"{self._base(name)}.idx", mode))
        data, index = self.files[name]
        index.write(np.array([split.open_tokens], "<u8").tobytes())
        data.write(tokens.astype(self.dtype).tobytes())
        split.open_tokens += len(tokens)
        split.open_documents += 1
        split.tokens += len(tokens)
        split.documents += 1
        split.bytes += size
        split.last_document = [len(tokens), size]
        if split.open_tokens >= self.shard_tokens:
            self._close_shard(name)

    def _close_shard(self, name: str) -> None:
        split, base = self.splits[name], self._base(name)
        for file in self.files.pop(name, ()):
            file.close()
        if split.open_documents:
            split.shards.append({"file": base, "tokens": split.open_tokens, "documents": split.open_documents})
        split.open_tokens = split.open_documents = 0

    def commit(self, consumed: int) -> None:
        """Makes everything so far durable: files first, then the journal by rename."""
        self.consumed = consumed
        for pair in self.files.values():
            for file in pair:
                file.flush()
                os.fsync(file.fileno())
        temporary = self.folder / "journal.tmp"
        temporary.write_text(json.dumps({"consumed": consumed, "splits": {name: asdict(split) for name, split in self.splits.items()}}))
        os.replace(temporary, self.folder / "journal.json")

    def hold_out_something(self) -> None:
        """Where no document fell to the held-out split, moves the newest training document there (if it is not the only one)."""
        train, valid = self.splits["train"], self.splits["valid"]
        if valid.documents or train.documents < 2:
            return
        if not train.open_documents:  # the newest document closed its shard: open that again
            shard = train.shards.pop()
            train.open_tokens, train.open_documents = shard["tokens"], shard["documents"]
        for file in self.files.pop("train", ()):
            file.close()
        base, (n, size) = self._base("train"), train.last_document
        tokens = np.fromfile(self.folder / f"{base}.bin", self.dtype)[-n:]
        train.open_tokens, train.open_documents, train.tokens, train.documents, train.bytes = (
            train.open_tokens - n,
            train.open_documents - 1,
            train.tokens - n,
            train.documents - 1,
            train.bytes - size,
        )
        os.truncate(self.folder / f"{base}.bin", train.open_tokens * self.dtype.itemsize)
        os.truncate(self.folder / f"{base}.idx", train.open_documents * 8)
        if not train.open_documents:
            (self.folder / f"{base}.bin").unlink()
            (self.folder / f"{base}.idx").unlink()
        self.add("valid", tokens, size)

    def finish(self, final: Path, meta: dict[str, Any]) -> None:
        """Closes the shards, writes meta.json last and renames the folder to `final`."""
        for name in self.splits:
            self._close_shard(name)
        splits = {
            name: {"tokens": s.tokens, "documents": s.documents, "bytes": s.bytes, "shards": s.shards} for name, s in self.splits.items()
        }
        content = {**meta, "dtype": self.dtype.name, "splits": splits}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for split in splits.values():
            for shard in split["shards"]:  # type: ignore[attr-defined]
                with (self.folder / f"{shard['file']}.bin").open("rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
        content["fingerprint"] = digest.hexdigest()
        (self.folder / "meta.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / "journal.json").unlink(missing_ok=True)
        (self.folder / "identity.json").unlink(missing_ok=True)
        os.replace(self.folder, final)
