"""Turns documents into token shards.

    python -m data.prepare input=demo out=runs/data/demo tokenizer=bpe:2048
    python -m data.prepare input=corpus/,more.jsonl.xz out=DIR tokenizer=gpt2.json valid_fraction=0.01
    python -m data.prepare input=hf:wikitext:wikitext-103-raw-v1:train out=DIR tokenizer=EleutherAI/gpt-neox-20b

Keys
  input           comma-separated: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet files (also .gz, .bz2, .xz, .zst), folders, globs, `demo`,
                  or hf:NAME[:CONFIG[:SPLIT]] (streamed)
  out             folder to make
  tokenizer       bpe:SIZE (trained on the input), `bytes`, a tokenizer.json, a folder with one, or a name on the Hub
  text_field      field of a JSON record or column of a table [text]; a.b goes into objects and through lists
  valid_fraction  share of documents held out, chosen by a hash of their text [0.01]; of a single document, its end
  valid_docs      held out instead: these documents, counted from 0, e.g. valid_docs=[4,7]
  train_mb        text a BPE is trained on, in MB [100]
  shard_tokens    tokens per file [100000000]
  limit_docs      only the first so many documents
  workers         threads of the tokenizer [0: all cores]
  strict          true: the first bad record ends the run [false: bad records are counted and left out]
  overwrite       true: replace what lies at out [false]
  benchmark       true: also time a bare tokenizers.encode_batch loop over the same text, and print both rates

Interrupted, the same command goes on where it stopped and ends in the same bytes. Exit status: 0 done, 2 mistake, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.corpus import INPUTS, Corpus, change, tokenizer_identity
from data.encode import Encoder, batches
from data.errors import UserError, reason_of
from data.fields import arguments_of
from data.listing import shown
from data.not_kept import not_kept
from data.program import program
from data.progress import Progress
from data.shards import FORMAT, read_meta
from data.tokenizer import Marks, fingerprint, load_tokenizer, marks_of, tokenizer_config, train_bpe
from data.writer import ShardWriter, digest_of, publish

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
    workers: int = 0
    strict: bool = False
    overwrite: bool = False
    benchmark: bool = False


def parse(words: list[str]) -> Arguments:
    """Arguments from key=value words. Raises UserError with a line per problem."""
    problems: list[str] = []
    arguments = arguments_of(words, Arguments, problems)
    problems += [
        f"Say {key}=..." for key in ("input", "out", "tokenizer") if not getattr(arguments, key) and not any(key in p for p in problems)
    ]
    if not 0 <= arguments.valid_fraction < 1:
        problems.append(f"valid_fraction must be from 0 up to 1, not {arguments.valid_fraction}.")
    if arguments.shard_tokens < 1 or arguments.limit_docs < 0 or arguments.workers < 0 or not 0 < arguments.train_mb < math.inf:
        problems.append("shard_tokens and train_mb must be above zero, limit_docs and workers zero or more.")
    if any(number < 0 for number in arguments.valid_docs):
        problems.append("valid_docs are counted from 0.")
    if problems:
        raise UserError(problems)
    return arguments


def _limited(texts: Iterator[str], megabytes: float) -> Iterator[str]:
    left = megabytes * 1e6
    for text in texts:
        yield text[: int(left)]
        left -= len(text)
        if left <= 0:
            return


def make_tokenizer(arguments: Arguments, corpus: Corpus) -> tuple[Tokenizer, Marks]:
    """The tokenizer that was asked for, trained if it is to be, and what it puts around documents. Raises UserError."""
    if not arguments.tokenizer.startswith("bpe:"):
        return load_tokenizer(arguments.tokenizer)
    size = arguments.tokenizer.removeprefix("bpe:")
    if not size.isdigit():
        raise UserError(f"tokenizer=bpe:SIZE needs a whole number, not {size!r}.")
    start = time.perf_counter()
    texts = _limited(iter(corpus), arguments.train_mb)
    first = next(texts, None)
    if first is None:
        raise UserError(_nothing(arguments, corpus))
    tokenizer = train_bpe(_chain(first, texts), int(size))
    print(f"trained a BPE of {tokenizer.get_vocab_size():,} tokens in {time.perf_counter() - start:.1f} s", flush=True)
    return tokenizer, marks_of(tokenizer)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _nothing(arguments: Arguments, corpus: Corpus) -> str:
    why = f" ({'; '.join(line.removeprefix('left out, ') for line in corpus.bad_told())})" if corpus.bad else ""
    return f"input={shown(arguments.input)} holds no usable text{why}; check the files and text_field."


def held_out(text: bytes, number: int, arguments: Arguments, cut: bool = False) -> bool:
    """Whether a document is of the held-out split: by its number if such were named, else by a keyed hash, so copies fall to one side.
    cut: it is a part of a single document, the second of which is held out."""
    if cut:
        return number == 1
    if arguments.valid_docs:
        return number in arguments.valid_docs
    return int.from_bytes(hashlib.blake2b(text, key=b"held out", digest_size=8).digest(), "big") < arguments.valid_fraction * 2**64


def prepare(arguments: Arguments) -> dict[str, Any]:
    """Makes the shard folder and returns its meta. Raises UserError for what the user can mend."""
    out = Path(os.path.abspath(arguments.out))
    partial = out.with_name(out.name + ".partial")
    corpus = Corpus(
        arguments.input,
        arguments.text_field,
        arguments.strict,
        arguments.limit_docs,
        0.0 if arguments.valid_docs else arguments.valid_fraction,
    )
    passing = {"overwrite": None, "benchmark": None, "out": None, "workers": None}
    settings = dataclasses.asdict(arguments) | passing | {"input": corpus.identity(), "tokenizer": tokenizer_identity(arguments.tokenizer)}
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    meta = _finished(out, identity, arguments, settings)
    if meta is not None:
        return meta
    for line in corpus.reading():
        print(line, flush=True)
    with _locked(partial):
        if (partial / "meta.json").exists() and read_meta(partial).get("identity") == identity:  # killed just before the last rename
            publish(partial, out)
            return read_meta(out)
        tokenizer, marks = _open_partial(partial, identity, settings, arguments, corpus)
        vocab = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        writer = ShardWriter(partial, np.dtype("uint16" if vocab <= 65536 else "uint32"), arguments.shard_tokens)
        if writer.resume():
            print(f"going on after {writer.consumed:,} documents", flush=True)
        encoder = Encoder(tokenizer, marks)
        try:
            rate = _written(writer, corpus, encoder, arguments)
            meta = writer.finish(
                {
                    "format": FORMAT,
                    "vocab_size": vocab,
                    "eot_id": marks.start,
                    **({} if marks.end is None else {"end_id": marks.end}),
                    "tokenizer_sha256": fingerprint(tokenizer),
                    "identity": identity,
                    "input": arguments.input,
                    "bad_records": dict(corpus.bad),
                    "left_out": [*corpus.left_out(), *not_kept(writer, tokenizer, marks)],
                }
            )
            publish(partial, out)
        except OSError as error:
            raise UserError(f"{partial} cannot be written: {error.strerror or error}; mend that and run the same command again.") from error
    if arguments.benchmark:
        _benchmark(corpus, encoder, rate)
    return meta


def _finished(out: Path, identity: str, arguments: Arguments, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The meta of shards that are complete already. Raises UserError where something else lies at `out`."""
    if not os.path.lexists(out):
        return None
    if not (out / "meta.json").exists():
        if not out.is_dir() or any(out.iterdir()):
            raise UserError(f"{out} exists and is no shard folder; choose another out.")
        return None
    if arguments.overwrite:
        return None
    meta = read_meta(out)
    if meta.get("identity") != identity:
        raise UserError(
            f"{out} holds shards of other text or another tokenizer{change(out, settings)}; choose another out, or overwrite=true."
        )
    print(f"{out} is already complete: {meta['splits']['train']['tokens']:,} training tokens")
    return meta


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes out of it while this one writes (where the system has file locks)."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {reason_of(error)}.") from error
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is preparing {partial}; wait for it, or choose another out.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def _open_partial(partial: Path, identity: str, settings: dict[str, Any], arguments: Arguments, corpus: Corpus) -> tuple[Tokenizer, Marks]:
    """The tokenizer of a run to go on with, or a fresh one in an emptied folder."""
    try:
        if json.loads((partial / "identity.json").read_text()) == identity:
            tokenizer = Tokenizer.from_file(str(partial / "tokenizer.json"))
            return tokenizer, marks_of(tokenizer, partial)
    except (OSError, ValueError):
        pass
    try:
        tokenizer, marks = make_tokenizer(arguments, corpus)
    except ValueError:
        with contextlib.suppress(OSError):
            partial.rmdir()  # nothing half-made stays, unless it is an earlier run's
        raise
    try:
        for path in partial.iterdir():
            path.unlink()
        (partial / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
        (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer, marks), indent=1) + "\n", encoding="utf-8")
        (partial / INPUTS).write_text(json.dumps(settings) + "\n")
        (partial / "identity.json").write_text(json.dumps(identity))
    except OSError as error:
        raise UserError(f"{partial} cannot be written: {reason_of(error)}.") from error
    return tokenizer, marks


def _written(writer: ShardWriter, corpus: Corpus, encoder: Encoder, arguments: Arguments) -> float:
    """Writes all documents into splits of which none is empty, if there are two; returns the rate. Raises UserError, and where nothing that a
    second run could go on with is there by then, leaves no folder."""
    try:
        while True:
            rate = _write(writer, corpus, encoder, arguments)
            if not _settle_splits(writer, corpus, arguments):
                return rate
    except UserError:
        if writer.folder.exists() and not (arguments.tokenizer.startswith("bpe:") or (writer.folder / "journal.json").exists()):
            _removed(writer)
        raise


def _removed(writer: ShardWriter) -> None:
    writer.close_files()
    for path in writer.folder.iterdir():
        path.unlink()
    writer.folder.rmdir()


def _write(writer: ShardWriter, corpus: Corpus, encoder: Encoder, arguments: Arguments) -> float:
    """Encodes and writes all documents that are not written yet; returns the rate in million tokens a second."""
    progress, number, committed = Progress(), writer.consumed, time.perf_counter()
    together = writer.together()
    try:
        for texts, ids in encoder.stream(batches(iter(corpus), writer.consumed)):
            encoded = [text.encode() for text in texts]
            is_valid = [held_out(text, number + i, arguments, corpus.cut) for i, text in enumerate(encoded)]
            if together:  # a document and its copies, without which a split would be empty
                target, sha256 = together
                is_valid = [target == "valid" if digest_of(ids[i]) == sha256 else valid for i, valid in enumerate(is_valid)]
            for name, side in (("train", False), ("valid", True)):
                chosen = [i for i, h in enumerate(is_valid) if h == side]
                writer.extend(name, [ids[i] for i in chosen], [len(encoded[i]) for i in chosen])
            number += len(texts)
            progress.add(len(texts), sum(map(len, ids)), sum(map(len, encoded)))
            if time.perf_counter() - committed > COMMIT_SECONDS:
                writer.commit(number)
                committed = time.perf_counter()
        writer.commit(number)
        return progress.rate
    finally:
        progress.close()


def _settle_splits(writer: ShardWriter, corpus: Corpus, arguments: Arguments) -> bool:
    """Sees to it that no split stays empty: the newest document goes over, and if there are copies of it they do too, for which all is to be
    written once more (True). Raises UserError when there is no text, or no such document to hold out."""
    problem, train = "", writer.splits["train"].documents
    if not writer.consumed:
        problem = _nothing(arguments, corpus)
    elif arguments.valid_docs and max(arguments.valid_docs) >= writer.consumed:
        problem = f"valid_docs names document {max(arguments.valid_docs)}, but they are 0 to {writer.consumed - 1}."
    elif arguments.valid_docs and not train:
        problem = "valid_docs holds out every document; leave some to train on."
    if problem:
        _removed(writer)
        raise UserError(problem)
    if train and (writer.splits["valid"].documents or train == 1 or not arguments.valid_fraction) or writer.together():
        return False
    source, target = ("train", "valid") if train else ("valid", "train")
    copies = writer.copies_of_newest(source)
    if copies == 1:
        writer.move_newest(source, target)
    elif copies == train:
        print(f"all {copies:,} documents are the same, so that none is held out", flush=True)
    else:
        print(f"the newest document is there {copies:,} times; all go to the {target} split, so all is written again", flush=True)
        writer.start_again(target, digest_of(writer.newest(source)))
        return True
    return False


def _benchmark(corpus: Corpus, encoder: Encoder, rate: float) -> None:
    """Prints the rate of a bare encode_batch loop over (up to 100 MB of) the same documents already in memory, and that of this run."""
    groups = list(batches(_limited(iter(corpus), 100.0)))
    start = time.perf_counter()
    tokens = sum(len(e.ids) for group in groups for e in encoder.tokenizer.encode_batch(group, add_special_tokens=False))
    bare = tokens / (time.perf_counter() - start) / 1e6
    print(f"prepare, with reading and writing: {rate:.2f} M tokens/s; bare encode_batch: {bare:.2f} M tokens/s; ratio {rate / bare:.2f}")


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return program(__doc__, run, words, interrupted="interrupted; the same command goes on where this one stopped")


def run(words: list[str]) -> int:
    """What the command line asks for. Raises UserError."""
    if not words:
        print(__doc__)
        return 2
    arguments = parse(words)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if arguments.workers:
        os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)  # read when the tokenizer first starts its threads
    try:
        meta = prepare(arguments)
    except BrokenPipeError:
        raise
    except OSError as error:
        name = shown(error.filename or "A file")
        raise UserError(f"{name} cannot be opened: {error.strerror or error}; mend that and run the same command again.") from error
    for line in meta.get("left_out", ()):
        print(line)
    for name, split in meta["splits"].items():
        print(
            f"{arguments.out} {name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes, {len(split['shards'])} shard(s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
