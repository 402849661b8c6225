"""Turns documents into token shards.

    python -m data.prepare input=demo out=runs/data/demo tokenizer=bpe:2048
    python -m data.prepare input=corpus/,more.jsonl.xz out=DIR tokenizer=gpt2.json valid_fraction=0.01
    python -m data.prepare input=hf:wikitext:wikitext-103-raw-v1:train out=DIR tokenizer=EleutherAI/gpt-neox-20b

Keys
  input           comma-separated: .txt, .jsonl, .parquet files (gz or xz too), folders, globs, `demo`, or hf:NAME[:CONFIG[:SPLIT]] (streamed)
  out             folder to make
  tokenizer       bpe:SIZE (trained on the input), `bytes`, a tokenizer.json, a folder with one, or a name on the Hub
  text_field      field of a JSON record or Parquet column [text]
  valid_fraction  share of documents held out, chosen by a hash of their text [0.01]
  valid_docs      held out instead: these documents, counted from 0, e.g. valid_docs=[4,7]
  train_mb        text a BPE is trained on, in MB [100]
  shard_tokens    tokens per file [100000000]
  limit_docs      only the first so many documents
  strict          true: the first bad record ends the run [false: bad records are counted and left out]
  overwrite       true: replace what lies at out [false]
  benchmark       true: also time a bare tokenizers.encode_batch loop over the same text

Interrupted, the same command goes on where it stopped. All cores work (limit them with RAYON_NUM_THREADS).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.sources import Source
from data.tokenizer import encode_bare, eot_id, fingerprint, load_tokenizer, train_bpe
from data.writer import ShardWriter

BATCH_DOCUMENTS, BATCH_CHARACTERS = 128, 4_000_000
COMMIT_SECONDS = 5.0


@dataclass
class Arguments:
    input: str = ""
    out: str = ""
    tokenizer: str = ""
    text_field: str = "text"
    valid_fraction: float = 0.01
    valid_docs: list[int] = field(default_factory=list)
    train_mb: float = 100.0
    shard_tokens: int = 100_000_000
    limit_docs: int = 0
    strict: bool = False
    overwrite: bool = False
    benchmark: bool = False


def parse(words: list[str]) -> Arguments:
    """Arguments from key=value words. Raises ValueError with a line per problem."""
    known = {f.name: f for f in dataclasses.fields(Arguments)}
    values: dict[str, Any] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            problems.append(f"Unknown argument {word!r}; the keys are {', '.join(known)}.")
            continue
        kind = known[key].type
        try:
            if kind == "bool":
                values[key] = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
            elif kind == "list[int]":
                values[key] = [int(part) for part in text.strip("[]").split(",") if part]
            else:
                values[key] = {"int": int, "float": float}.get(str(kind), str)(text)
        except (ValueError, KeyError):
            problems.append(f"{key} must be of type {kind}, not {text!r}.")
    arguments = Arguments(**values)
    problems += [
        f"Say {key}=..." for key in ("input", "out", "tokenizer") if not getattr(arguments, key) and not any(key in p for p in problems)
    ]
    if not 0 <= arguments.valid_fraction < 1:
        problems.append(f"valid_fraction must be from 0 up to 1, not {arguments.valid_fraction}.")
    if arguments.shard_tokens < 1 or arguments.limit_docs < 0:
        problems.append("shard_tokens must be above zero and limit_docs zero or more.")
    if problems:
        raise ValueError("\n".join(problems))
    return arguments


class Corpus:
    """The documents of all inputs in order, once per iteration."""

    def __init__(self, arguments: Arguments) -> None:
        self.sources = [Source(spec, arguments.text_field, arguments.strict) for spec in arguments.input.split(",")]
        self.limit = arguments.limit_docs

    def identity(self) -> list[Any]:
        return [source.identity() for source in self.sources]

    def __iter__(self) -> Iterator[str]:
        count = 0
        for source in self.sources:
            source.bad.clear()
            for text in source:
                if self.limit and count == self.limit:
                    return
                count += 1
                yield text

    @property
    def bad(self) -> Counter[str]:
        return sum((source.bad for source in self.sources), Counter())


def _limited(texts: Iterator[str], megabytes: float) -> Iterator[str]:
    left = megabytes * 1e6
    for text in texts:
        yield text[: int(left)]
        left -= len(text)
        if left <= 0:
            return


def make_tokenizer(arguments: Arguments, corpus: Corpus) -> Tokenizer:
    """The tokenizer that was asked for, trained if it is to be. Raises ValueError."""
    if not arguments.tokenizer.startswith("bpe:"):
        return load_tokenizer(arguments.tokenizer)
    size = arguments.tokenizer.removeprefix("bpe:")
    if not size.isdigit():
        raise ValueError(f"tokenizer=bpe:SIZE needs a whole number, not {size!r}.")
    start = time.perf_counter()
    texts = _limited(iter(corpus), arguments.train_mb)
    first = next(texts, None)
    if first is None:
        raise ValueError(_nothing(arguments, corpus))
    tokenizer = train_bpe(_chain(first, texts), int(size))
    print(f"trained a BPE of {tokenizer.get_vocab_size():,} tokens in {time.perf_counter() - start:.1f} s", flush=True)
    return tokenizer


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _nothing(arguments: Arguments, corpus: Corpus) -> str:
    why = f" ({_counts(corpus.bad)})" if corpus.bad else ""
    return f"input={arguments.input} holds no usable text{why}; check the files and text_field."


def _counts(bad: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in bad.most_common())


def batches(texts: Iterator[str], skip: int) -> Iterator[list[str]]:
    """Groups of documents for one parallel call of the tokenizer, read ahead on a thread; the first `skip` are passed over."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=3)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read() -> None:
        group: list[str] = []
        size = 0
        try:
            for number, text in enumerate(texts):
                if stop.is_set():
                    return
                if number < skip:
                    continue
                group.append(text)
                size += len(text)
                if len(group) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
                    put(group)
                    group, size = [], 0
            if group:
                put(group)
            put(None)
        except Exception as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def held_out(text: str, number: int, arguments: Arguments) -> bool:
    if arguments.valid_docs:
        return number in arguments.valid_docs
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < arguments.valid_fraction * 2**64


class Progress:
    """A line on the terminal, or a plain one now and then where there is none."""

    def __init__(self) -> None:
        self.start = self.shown = time.perf_counter()
        self.tty = sys.stderr.isatty()

    def show(self, documents: int, tokens: int, size: int, last: bool = False) -> None:
        now = time.perf_counter()
        if not last and now - self.shown < (0.2 if self.tty else 10.0):
            return
        self.shown = now
        seconds = max(now - self.start, 1e-9)
        text = f"{documents:,} documents, {tokens:,} tokens, {size / 1e6:.1f} MB; {tokens / seconds / 1e6:.2f} M tokens/s, {size / seconds / 1e6:.2f} MB/s"
        print(("\r" if self.tty else "") + text, end="" if self.tty and not last else "\n", file=sys.stderr, flush=True)


def prepare(arguments: Arguments) -> dict[str, Any]:
    """Makes the shard folder and returns its meta. Raises ValueError for what the user can mend."""
    out = Path(arguments.out)
    partial = out.with_name(out.name + ".partial")
    corpus = Corpus(arguments)
    wanted = dataclasses.asdict(arguments) | {"overwrite": None, "benchmark": None, "out": None, "input": corpus.identity()}
    identity = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    if (out / "meta.json").exists() and not arguments.overwrite:
        meta = json.loads((out / "meta.json").read_text())
        if meta.get("identity") != identity:
            raise ValueError(f"{out} holds shards of other text or another tokenizer; choose another out, or overwrite=true.")
        print(f"{out} is already complete: {meta['splits']['train']['tokens']:,} training tokens")
        return meta
    if out.exists() and not (out / "meta.json").exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is no shard folder; choose another out.")
    tokenizer = _open_partial(partial, identity, arguments, corpus)
    encoder, eot = encode_bare(tokenizer), eot_id(tokenizer)
    vocab = max(tokenizer.get_vocab_size(with_added_tokens=True), max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1)
    writer = ShardWriter(partial, np.dtype("uint16" if vocab <= 65536 else "uint32"), arguments.shard_tokens)
    if writer.resume():
        print(f"going on after {writer.consumed:,} documents", flush=True)
    _write(writer, corpus, encoder, eot, arguments)
    if arguments.valid_fraction or arguments.valid_docs:
        writer.hold_out_something()
    if not writer.splits["train"].documents:
        shutil.rmtree(partial)
        raise ValueError(
            _nothing(arguments, corpus)
            if not writer.splits["valid"].documents
            else "Every document fell to the held-out split; lower valid_fraction or give more documents."
        )
    meta = {
        "format": 1,
        "vocab_size": vocab,
        "eot_id": eot,
        "tokenizer_sha256": fingerprint(tokenizer),
        "identity": identity,
        "input": arguments.input,
        "bad_records": dict(corpus.bad),
    }
    if out.exists():
        shutil.rmtree(out)
    writer.finish(out, meta)
    if arguments.benchmark:
        _benchmark(corpus, encoder)
    return json.loads((out / "meta.json").read_text())


def _open_partial(partial: Path, identity: str, arguments: Arguments, corpus: Corpus) -> Tokenizer:
    """The tokenizer of a run to go on with, or a fresh one in a fresh folder."""
    try:
        if (partial / "identity.json").exists() and json.loads((partial / "identity.json").read_text()) == identity:
            return Tokenizer.from_file(str(partial / "tokenizer.json"))
    except (OSError, ValueError):
        pass
    tokenizer = make_tokenizer(arguments, corpus)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "tokenizer.json").write_text(tokenizer.to_str(pretty=False))
        (partial / "identity.json").write_text(json.dumps(identity))
    except OSError as error:
        raise ValueError(f"{partial} cannot be written: {error.strerror}.") from error
    return tokenizer


def _write(writer: ShardWriter, corpus: Corpus, encoder: Tokenizer, eot: int, arguments: Arguments) -> None:
    progress, number, tokens, size = Progress(), writer.consumed, 0, 0
    committed = time.perf_counter()
    try:
        for group in batches(iter(corpus), writer.consumed):
            for text, encoding in zip(group, encoder.encode_batch_fast(group, add_special_tokens=False)):
                ids = np.array([eot, *encoding.ids], dtype=np.uint32)
                length = len(text.encode())
                writer.add("valid" if held_out(text, number, arguments) else "train", ids, length)
                number, tokens, size = number + 1, tokens + len(ids), size + length
            if time.perf_counter() - committed > COMMIT_SECONDS:
                writer.commit(number)
                committed = time.perf_counter()
            progress.show(number, tokens, size)
        writer.commit(number)
    except OSError as error:
        raise ValueError(
            f"{writer.folder} cannot be written: {error.strerror or error}; free some space and run the same command again."
        ) from error
    progress.show(number, tokens, size, last=True)


def _benchmark(corpus: Corpus, encoder: Tokenizer) -> None:
    """Prints the rate of a bare encode_batch loop over the same documents already in memory."""
    groups = list(batches(iter(corpus), 0))
    start = time.perf_counter()
    tokens = sum(len(e.ids) for group in groups for e in encoder.encode_batch(group, add_special_tokens=False))
    print(f"bare encode_batch over the same text: {tokens / (time.perf_counter() - start) / 1e6:.2f} M tokens/s")


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    words = sys.argv[1:] if words is None else words
    if not words or any(w in ("-h", "--help", "help") for w in words):
        print(__doc__)
        return 0 if words else 2
    try:
        arguments = parse(words)
        meta = prepare(arguments)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    if meta.get("bad_records"):
        print(f"left out: {_counts(Counter(meta['bad_records']))}")
    for name, split in meta["splits"].items():
        print(
            f"{arguments.out} {name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes, {len(split['shards'])} shard(s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
