"""The corpus of the board: documents in an order and a held-out set that follow from their text alone, one tokenizer, and token shards.

    python -m scripts.board corpus input=corpus.jsonl.xz data=DIR
    python -m scripts.board corpus data=DIR part=SMALL                       the first shard of training tokens and the held-out documents alone

Documents are ordered by a keyed hash, so the first shard is a sample of all sources. Held out are one document in a hundred by `data.prepare`'s
own rule, and, since few of those are long, the first LONG documents of LONG_BYTES or more in that order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from data import prepare
from data.corpus import Corpus
from data.errors import UserError
from data.files import write_json
from data.shards import ShardSet, read_meta

VOCABULARY = 16_384
SHARD_TOKENS = 25_000_000
FRACTION, LONG, LONG_BYTES = 0.01, 12, 170_000  # 64 x 512 tokens are about 130,000 bytes of English prose, more of tables


def place(text: bytes) -> bytes:
    """What documents are sorted by."""
    return hashlib.blake2b(text, key=b"order of the board", digest_size=16).digest()


def ordered(input_: str) -> tuple[list[str], list[int]]:
    """(documents in the board's order, numbers of the held-out ones)."""
    texts = sorted(Corpus(input_, "text", False, 0, FRACTION), key=lambda text: place(text.encode()))
    by_hash = prepare.Arguments(valid_fraction=FRACTION)
    chosen = [i for i, text in enumerate(texts) if prepare.held_out(text.encode(), i, by_hash)]
    long = [i for i, text in enumerate(texts) if len(text.encode()) >= LONG_BYTES and i not in set(chosen)]
    return texts, sorted({*chosen, *long[: min(LONG, max(1, len(texts) // 10))]})  # of a small corpus a tenth at most


def make(input_: str, data: Path, vocabulary: int = VOCABULARY, shard_tokens: int = SHARD_TOKENS, tokenizer: str = "") -> int:
    """Writes the documents in order beside `data` and their shards into it; the exit status. tokenizer: one that exists already, instead of a new
    BPE of `vocabulary` tokens."""
    texts, chosen = ordered(input_)
    lines = data.with_name(data.name + ".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    temporary = lines.with_name(f"{lines.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    os.replace(temporary, lines)
    words = [
        f"input={lines}",
        f"out={data}",
        f"tokenizer={tokenizer or f'bpe:{vocabulary}'}",
        f"shard_tokens={shard_tokens}",
        "train_mb=64",
    ]
    return prepare.run([*words, f"valid_docs=[{','.join(map(str, chosen))}]"])


def part(data: Path, out: Path) -> None:
    """A folder with the held-out documents and the first shard of training tokens only, which cells of small budgets read alike. Raises UserError."""
    meta = read_meta(data)
    first = meta["splits"]["train"]["shards"][0]
    if "bytes" not in first:
        raise UserError(f"{data} does not say how long its documents are; prepare it again.")
    meta["splits"]["train"] = {key: first[key] for key in ("tokens", "documents", "bytes")} | {"shards": [first]}
    meta["fingerprint"] = hashlib.sha256(json.dumps(meta["splits"], sort_keys=True).encode()).hexdigest()
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    files = [f"{shard['file']}{end}" for split in meta["splits"].values() for shard in split["shards"] for end in (".bin", ".idx", ".len")]
    for name in [*files, "tokenizer.json", "tokenizer_config.json"]:
        shutil.copyfile(data / name, temporary / name)
    write_json(temporary / "meta.json", meta)
    if out.exists():
        shutil.rmtree(out)
    os.replace(temporary, out)
    ShardSet(out, "train").verify()


def identity(data: str | Path, tokens: int | None = None) -> dict[str, Any]:
    """What a cell was trained and measured on: the tokenizer, the shards that hold its first `tokens` training tokens (None: all) and the held-out
    split, by their checksums; the same for a folder that holds no more than those shards. Raises UserError where there are not so many tokens."""
    meta = read_meta(Path(data))
    shards, there = [], 0
    for shard in meta["splits"]["train"]["shards"]:
        if tokens is None or there < tokens:
            shards.append(shard["sha256"])
            there += shard["tokens"]
    if tokens is not None and there < tokens:
        raise UserError(
            f"{data} holds {there:,} training tokens of the {tokens:,} that are asked for; prepare more text, or name the stages that need less with stages=."
        )
    held_out = [shard["sha256"] for shard in meta["splits"]["valid"]["shards"]]
    return {"tokenizer": meta["tokenizer_sha256"], "train": shards, "held_out": held_out}


def training_tokens(data: str | Path) -> int:
    """How many training tokens the folder holds."""
    return sum(shard["tokens"] for shard in read_meta(Path(data))["splits"]["train"]["shards"])


def split(data: Path, out: Path, most: int) -> list[Path]:
    """Copies the files of `data` into folders OUT-0, OUT-1, ... of at most `most` bytes each, in the order of their names; `join` puts them together."""
    folders: list[Path] = []
    room = 0
    for path in sorted(data.iterdir()):
        size = path.stat().st_size
        if size > most:
            raise UserError(f"{path} has {size:,} bytes, more than the {most:,} of a part; make the corpus with smaller shards.")
        if size > room:
            folders.append(out.with_name(f"{out.name}-{len(folders)}"))
            folders[-1].mkdir(parents=True)
            room = most
        shutil.copyfile(path, folders[-1] / path.name)
        room -= size
    return folders


def join(parts: list[Path], data: Path) -> None:
    """Puts the files of `split` back together at `data`, and compares every shard with its checksum. Raises UserError."""
    temporary = data.with_name(f"{data.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    for folder in parts:
        for path in folder.iterdir():
            shutil.copyfile(path, temporary / path.name)
    for name in read_meta(temporary)["splits"]:
        ShardSet(temporary, name).verify()
    if data.exists():
        shutil.rmtree(data)
    os.replace(temporary, data)


def command(values: dict[str, Any]) -> int:
    """`python -m scripts.board corpus`; the exit status. Raises UserError."""
    data = Path(values["data"])
    if values["join"]:
        join([Path(name) for name in values["join"].split(",")], data)
    elif values["part"]:
        part(data, Path(values["part"]))
    elif values["input"]:
        return make(values["input"], data, values["vocabulary"], tokenizer=values["tokenizer"])
    else:
        raise UserError("Say input=..., or of shards that are there part=... or join=....")
    return 0
