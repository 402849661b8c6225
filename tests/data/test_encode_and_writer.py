"""Cutting long documents changes no id; shards survive a crash at any moment; segments come from the document index."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from data.encode import KNOWN_PATTERNS, Encoder, can_cut, pieces
from data.loader import StreamReader
from data.prepare import main
from data.shards import ShardSet
from data.sources import DEMO, Source
from data.tokenizer import byte_tokenizer, eot_id, fingerprint, train_bpe
from data.verify import main as verify
from data.writer import ShardWriter, publish
from evals.measures.perplexity import held_out_rows
from tests.data.test_order_and_loader import make

ALPHABET = [
    "a",
    "Z",
    "the",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "'s",
    "'re ",
    "é",
    "e\u0301",
    "漢",
    "🙂",
    "12",
    ".",
    "!?",
    "<|endoftext|>",
    "\u00a0",
    "\r\n",
    " \u0301",
]


def random_text(rng: np.random.Generator, n: int) -> str:
    return "".join(rng.choice(ALPHABET, n).tolist())


def variants() -> dict[str, Tokenizer]:
    rng = np.random.default_rng(0)
    base = train_bpe([random_text(rng, 2000) for _ in range(5)], 600)
    made = {"gpt2": base}
    neox = Tokenizer.from_str(base.to_str())
    neox.normalizer = normalizers.NFC()
    neox.add_tokens([AddedToken(" " * n, normalized=True) for n in range(2, 6)])
    made["neox"] = neox
    for i, pattern in enumerate(KNOWN_PATTERNS):
        made[f"split{i}"] = Tokenizer.from_str(base.to_str())
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        made[f"split{i}"].pre_tokenizer = pre_tokenizers.Sequence(steps)
    return made


def test_cutting_long_documents_changes_no_id() -> None:
    rng = np.random.default_rng(1)
    for name, tokenizer in variants().items():
        encoder = Encoder(tokenizer)
        assert encoder.cuts, name
        for size in (1, 3, 10):
            text = random_text(rng, 3000)
            parts = pieces(text, size)
            assert "".join(parts) == text and len(parts) > 20
            cut = [i for part in parts for i in encoder.tokenizer.encode(part, add_special_tokens=False).ids]
            assert cut == encoder.tokenizer.encode(text, add_special_tokens=False).ids, name


def test_a_long_document_is_cut_and_encoded_as_a_whole() -> None:
    tokenizer = variants()["gpt2"]
    text = next(iter(Source("demo")))[:150_000]
    assert len(pieces(text)) > 1
    ids = Encoder(tokenizer).encode([text, "short"])
    assert ids[0].tolist() == [eot_id(tokenizer), *tokenizer.encode(text).ids] and ids[0].dtype == np.uint32
    assert ids[1].tolist() == [eot_id(tokenizer), *tokenizer.encode("short").ids]


def test_what_could_change_ids_is_not_cut() -> None:
    base = train_bpe(["some words here " * 30], 300)
    for change in ("prefix", "lower", "metaspace", "strip", "dropout", "phrase"):
        tokenizer = Tokenizer.from_str(base.to_str())
        if change == "prefix":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        elif change == "lower":
            tokenizer.normalizer = normalizers.Lowercase()
        elif change == "metaspace":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        elif change == "strip":
            tokenizer.add_tokens([AddedToken("zebra", rstrip=True)])
        elif change == "phrase":
            tokenizer.add_tokens([AddedToken("a b")])
        else:
            tokenizer.model.dropout = 0.1
        assert not can_cut(tokenizer), change
    assert can_cut(base)


def test_the_table_of_bytes_is_the_tokenizer_of_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x800))) + "漢字 🙂 <|endoftext|>"
    encoder = Encoder(tokenizer)
    assert encoder.table is not None and Encoder(variants()["gpt2"]).table is None
    assert encoder.encode([text])[0].tolist() == [256, *encoder.tokenizer.encode(text).ids]


def documents(n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    return [np.array([256, *rng.integers(0, 256, k)]) for k in rng.integers(1, 60, n)]


def finished(writer: ShardWriter, final: Path) -> dict[str, bytes]:
    tokenizer = byte_tokenizer()
    (writer.folder / "tokenizer.json").write_text(tokenizer.to_str())
    writer.finish({"format": 1, "vocab_size": 257, "eot_id": 256, "tokenizer_sha256": fingerprint(tokenizer)})
    publish(writer.folder, final)
    return {p.name: p.read_bytes() for p in sorted(final.iterdir())}


class Killed(BaseException):
    """Stands for the power going away."""


@pytest.mark.parametrize("shard_tokens", [70, 10_000])
@pytest.mark.parametrize("kill_at", ["before", "between", "after"])
def test_a_crash_while_a_document_changes_sides_loses_nothing(tmp_path: Path, kill_at: str, shard_tokens: int) -> None:
    texts, results = documents(9), []
    for name in ("whole", "killed"):
        folder = tmp_path / f"{name}.partial"
        folder.mkdir()
        writer = ShardWriter(folder, np.dtype("uint16"), shard_tokens)
        writer.extend("train", texts, [len(t) for t in texts])
        writer.commit(9)
        if name == "killed":
            commits, real = [0], writer.commit

            def commit(consumed: int, commits: list[int] = commits, real: object = real) -> None:
                commits[0] += 1
                if commits[0] == 2 and kill_at == "between":
                    raise Killed
                real(consumed)  # type: ignore[operator]
                if (commits[0], kill_at) in ((1, "before"), (2, "after")):
                    raise Killed

            writer.commit = commit  # type: ignore[method-assign]
            with pytest.raises(Killed):
                writer.move_newest("train", "valid")
            writer.close_files()
            writer = ShardWriter(folder, np.dtype("uint16"), shard_tokens)
            assert writer.resume() and writer.consumed == 9
        if not writer.splits["valid"].documents:
            writer.move_newest("train", "valid")
        results.append(finished(writer, tmp_path / name))
    assert results[0] == results[1]
    train, valid = ShardSet(tmp_path / "killed", "train"), ShardSet(tmp_path / "killed", "valid")
    np.testing.assert_array_equal(train.read(0, train.n_tokens), np.concatenate(texts[:-1]))
    np.testing.assert_array_equal(valid.read(0, valid.n_tokens), texts[-1])
    train.verify()


def test_batches_of_documents_are_written_as_single_ones_are(tmp_path: Path) -> None:
    texts, results = documents(40), []
    for name, group in (("one", 1), ("seven", 7), ("all", 40)):
        folder = tmp_path / f"{name}.partial"
        folder.mkdir()
        writer = ShardWriter(folder, np.dtype("uint16"), 100)
        for i in range(0, 40, group):
            writer.extend("train", texts[i : i + group], [len(t) - 1 for t in texts[i : i + group]])
        results.append(finished(writer, tmp_path / name))
    assert results[0] == results[1] == results[2] and "train-00005.bin" in results[0]


def test_a_partial_folder_that_lost_bytes_is_not_gone_on_with(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, np.dtype("uint16"), 1000)
    writer.extend("train", documents(3), [1, 2, 3])
    writer.commit(3)
    (tmp_path / "train-00000.idx").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        ShardWriter(tmp_path, np.dtype("uint16"), 1000).resume()


@pytest.mark.parametrize("ending", [".bin", ".idx", ".len"])
def test_verify_finds_any_flipped_bit(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    shards = make(folder, [50, 60, 70, 40], shard_tokens=150)
    shards.verify()
    assert verify([str(folder)]) == 0 and "train: 3 documents, 183 tokens, as" in capsys.readouterr().out
    file = folder / f"train-00000{ending}"
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 13):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name} is damaged"):
            ShardSet(folder, "train").verify()
        if ending == ".idx":  # segments or a document would be of other places
            with pytest.raises(ValueError, match=f"{file.name} is damaged"):
                damaged_set = ShardSet(folder, "train")
                damaged_set.rows(np.array([0]), 183)
                for i in range(3):
                    damaged_set.document(i)
    assert verify([str(folder)]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and str(file) in told.err and "valid: 1 documents" in told.out


def test_rows_and_segments_against_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    folder = tmp_path / "s.partial"
    folder.mkdir()
    writer = ShardWriter(folder, np.dtype("uint16"), 64)
    texts = [np.array([256, *rng.integers(200, 257, int(n))]) for n in rng.integers(0, 39, 60)]  # 256 inside a document is no start of one
    writer.extend("train", texts, [len(t) for t in texts])
    finished(writer, tmp_path / "s")
    shards = ShardSet(tmp_path / "s", "train")
    whole, owner = np.concatenate(texts), np.repeat(np.arange(60), [len(t) for t in texts])
    assert len(shards.shards) > 5
    np.testing.assert_array_equal(shards.document_of(np.arange(len(whole))), owner)
    starts = rng.integers(0, len(whole) - 150, 50)
    tokens_RL, segments_RL = shards.rows(starts, 150)
    assert tokens_RL.dtype == np.int64 and segments_RL.dtype == np.int32
    for start, tokens_L, segments_L in zip(starts, tokens_RL, segments_RL):
        np.testing.assert_array_equal(tokens_L, whole[start : start + 150])
        np.testing.assert_array_equal(segments_L, owner[start : start + 150] - owner[start])
    for number, (tokens, segments) in enumerate(held_out_rows(shards, 100, None)):  # nor is it in evaluation
        np.testing.assert_array_equal(tokens, whole[100 * number : 100 * number + 101])
        np.testing.assert_array_equal(np.diff(segments) > 0, np.diff(owner[100 * number : 100 * number + 101]) > 0)
    for start, n in ((-1, 4), (len(whole) - 3, 4)):
        with pytest.raises(ValueError, match="outside"):
            shards.rows(np.array([start]), n)
    reader = StreamReader([(shards, 1.0)], 16, 3)
    for row in range(3):  # one document never goes on in another, also where the next epoch begins
        seen: list[int] = []
        truth: list[tuple[int, int]] = []
        for step in range(2 * reader.steps):
            segments_L = reader.sample(step * 3 + row)[1][:-1]
            epoch, place = divmod(step, reader.steps)
            first = row * reader.steps * 16 + place * 16
            seen += segments_L.tolist()
            truth += [(epoch, int(d)) for d in owner[first : first + 16]]
        changes = [a != b for a, b in zip(truth, truth[1:])]
        assert [a != b for a, b in zip(seen, seen[1:])] == changes


def run(tmp_path: Path, *words: str) -> int:
    return main([f"out={tmp_path / 'out'}", *(w.format(tmp=tmp_path) for w in words)])


def test_the_fingerprint_is_of_the_tokens_not_of_paths(tmp_path: Path) -> None:
    prints = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("".join(json.dumps({"text": f"text {i} {name == 'c'}"}) + "\n" for i in range(9)))
        assert main([f"input={tmp_path / name}", f"out={tmp_path / name}_out", "tokenizer=bytes"]) == 0
        prints.append(ShardSet(f"{tmp_path / name}_out", "train").fingerprint)
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("fraction", ["0.000001", "0.999999"])
def test_both_splits_get_a_document(tmp_path: Path, fraction: str) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)))
    assert run(tmp_path, "input={tmp}/x.jsonl", "tokenizer=bytes", f"valid_fraction={fraction}") == 0
    counts = sorted(ShardSet(tmp_path / "out", split).n_documents for split in ("train", "valid"))
    assert counts == [1, 8]


def test_one_document_is_training_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    assert run(tmp_path, "input={tmp}/x.txt", "tokenizer=bytes", "valid_fraction=0.99999") == 0
    assert ShardSet(tmp_path / "out", "train").n_documents == 1
    with pytest.raises(ValueError, match="no held-out documents"):
        ShardSet(tmp_path / "out", "valid")


@pytest.mark.parametrize(
    "words,expected",
    [
        (["input={tmp}/x.jsonl", "valid_docs=[4,9]"], "they are 0 to 8"),
        (["input={tmp}/x.jsonl", "valid_docs=[0,1,2,3,4,5,6,7,8]"], "leave some to train on"),
        (["input={tmp}/x.jsonl", "valid_docs=[-1]"], "counted from 0"),
        (["input={tmp}/torn.jsonl.gz"], "cannot be read"),
        (["input={tmp}/good.parquet", "text_field=nothing"], "no field 'nothing'.*fields there are text; set text_field"),
        (["input=hf:{tmp}/hub", "text_field=nothing"], "no column 'nothing'"),
        (["input=hf:{tmp}/none"], "cannot be opened"),
        (["input={tmp}/x.exe"], "of a kind"),
    ],
)
def test_more_mistakes_end_in_a_sentence(tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps({"text": f"text {i} " * 50}) + "\n" for i in range(9))
    (tmp_path / "x.jsonl").write_text(lines)
    (tmp_path / "x.exe").write_text("x")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(lines)
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:60])
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "good.parquet")
    assert run(tmp_path, *words, "tokenizer=bytes") == 2
    message = capsys.readouterr().err
    assert re.search(expected, message) and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_what_lies_at_out_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("hello there")
    (tmp_path / "out").write_text("mine")
    assert run(tmp_path, "input={tmp}/x.txt", "tokenizer=bytes", "overwrite=true") == 2
    assert "no shard folder" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_two_processes_do_not_write_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "x.txt").write_text("hello there")
    (tmp_path / "out.partial").mkdir()
    import os

    handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run(tmp_path, "input={tmp}/x.txt", "tokenizer=bytes") == 2
    assert "Another process" in capsys.readouterr().err
    os.close(handle)
    assert run(tmp_path, "input={tmp}/x.txt", "tokenizer=bytes") == 0


def test_killed_just_before_the_last_rename(tmp_path: Path) -> None:
    shutil.copy(DEMO, tmp_path / "d.jsonl.xz")
    words = ["input={tmp}/d.jsonl.xz", "tokenizer=bytes", "limit_docs=3"]
    assert run(tmp_path, *words) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    (tmp_path / "out").rename(tmp_path / "out.partial")
    assert run(tmp_path, *words) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before and not (tmp_path / "out.partial").exists()


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(65_537 - 257)])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "x.txt").write_text("hello word65000 word65279")
    assert run(tmp_path, "input={tmp}/x.txt", "tokenizer={tmp}/tokenizer.json") == 0
    shards = ShardSet(tmp_path / "out", "train")
    assert shards.dtype == np.uint32 and shards.vocab_size == 65_537 and shards.read(0, shards.n_tokens).max() == 65_536


def test_bad_lines_of_json_are_counted(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "with a mark"}\n' + deep + b'\n{"\x00": 1}\n7\n')
    source = Source(str(tmp_path / "x.jsonl"))
    assert list(source) == ["with a mark"]
    assert sum(source.bad.values()) == 3
