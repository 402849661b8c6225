"""data.prepare as a user runs it: formats, bad records, kills, mistakes."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from data.prepare import main
from data.shards import ShardSet
from data.tokenizer import byte_tokenizer, train_bpe
from data.writer import ShardWriter
from tests.conftest import run_program, start_program


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


TEXTS = [f"Document number {i}. " + "The quick brown fox jumps over the lazy dog. " * (i % 7 + 1) for i in range(60)]


def text_of(shards: ShardSet, i: int) -> str:
    return shards.tokenizer().decode(shards.document(i)[0].tolist(), skip_special_tokens=True)


def test_documents_come_back_as_they_were_and_no_split_is_empty(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert (
        main([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'out'}", "tokenizer=bpe:300", "valid_fraction=0.2", "shard_tokens=400"])
        == 0
    )
    train, valid = ShardSet(tmp_path / "out", "train"), ShardSet(tmp_path / "out", "valid")
    back = [text_of(s, i) for s in (train, valid) for i in range(s.n_documents)]
    assert sorted(back) == sorted(TEXTS) and valid.n_documents > 2
    assert train.n_bytes + valid.n_bytes == sum(len(t.encode()) for t in TEXTS)
    assert len(train.meta["splits"]["train"]["shards"]) > 2


@pytest.mark.parametrize(
    "texts,fraction,held_out",
    [
        (["one", "two", "three", "two"], 1e-9, ["two", "two"]),  # the newest is there twice: held out, neither is trained on
        (["two", "one", "two"], 1 - 1e-9, ["one"]),  # all would be held out; the newest is given away with its copy
        (["two", "two", "two"], 1e-9, []),
        (["two", "two", "two"], 1 - 1e-9, []),
        (["two", "two", "three"], 1e-9, ["three"]),
    ],
)
def test_no_copy_of_a_held_out_document_is_trained_on(tmp_path: Path, texts: list[str], fraction: float, held_out: list[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts)
    words = [f"input={tmp_path / 'a.jsonl'}", "tokenizer=bytes", f"valid_fraction={fraction}", "shard_tokens=5"]
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    parts = [ShardSet(tmp_path / "out", name) if split["documents"] else None for name, split in _splits(tmp_path / "out").items()]
    train, valid = ([text_of(part, i) for i in range(part.n_documents)] if part else [] for part in parts)
    assert valid == held_out and sorted(train + valid) == sorted(texts)


@pytest.mark.parametrize("method", ["start_again", "finish"])
def test_copies_stay_together_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Behind the moment in which it is settled that all is written again, and behind that."""
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three", "two"])
    words = [f"input={tmp_path / 'a.jsonl'}", "tokenizer=bytes", "valid_fraction=1e-9"]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    before = getattr(ShardWriter, method)

    def killed(self: ShardWriter, *given: Any) -> None:
        before(self, *given) if method == "start_again" else None
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, method, killed)
        assert main([*words, f"out={tmp_path / 'out'}"]) == 130
    assert main([*words, f"out={tmp_path / 'out'}"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _splits(folder: Path) -> dict[str, Any]:
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    return {name: splits[name] for name in ("train", "valid")}


def test_all_formats_give_the_same_tokens(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "txt").mkdir()
    for i, text in enumerate(TEXTS[:5]):
        (tmp_path / "txt" / f"{i}.txt").write_text(text)
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5])
    with lzma.open(tmp_path / "b.jsonl.xz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    pq.write_table(pa.table({"text": TEXTS[:5]}), tmp_path / "c.parquet")
    results: list[dict[str, Any]] = []
    for name in ("txt", "a.jsonl", "b.jsonl.xz", "c.parquet", f"hf:{tmp_path / 'hub'}"):
        if name.startswith("hf:"):
            (tmp_path / "hub").mkdir()
            write_jsonl(tmp_path / "hub" / "train.jsonl", TEXTS[:5])
        spec = name if name.startswith("hf:") else str(tmp_path / name)
        out = tmp_path / f"out{len(results)}"
        assert main([f"input={spec}", f"out={out}", "tokenizer=bytes", "valid_docs=[2]"]) == 0, name
        results.append({p: h for p, h in contents(out).items() if p not in ("meta.json", "inputs.json")})
    assert all(r == results[0] for r in results)


def test_bad_records_are_counted_not_fatal_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"text": "good one"}),
        json.dumps({"other": 1}),
        json.dumps({"text": ""}),
        json.dumps({"text": 5}),
        "{broken",
        json.dumps({"text": "good two"}),
    ]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff\xfe"}\n{"text": "\\ud800"}\n')
    assert main([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'o'}", "tokenizer=bytes"]) == 0
    bad = json.loads((tmp_path / "o" / "meta.json").read_text())["bad_records"]
    assert bad == {"no field 'text'": 1, "empty": 1, "field 'text' is not text": 1, "not JSON": 1, "not UTF-8": 2}
    assert "left out" in capsys.readouterr().out
    assert main([f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'p'}", "tokenizer=bytes", "strict=true"]) == 2
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "words,expected",
    [
        (["input=/nowhere/at/all", "tokenizer=bytes"], "nothing to read"),
        (["input={tmp}/empty.jsonl", "tokenizer=bytes"], "no usable text"),
        (["input={tmp}/empty.jsonl", "tokenizer=bpe:300"], "no usable text"),
        (["input={tmp}/bad.parquet", "tokenizer=bytes"], "not a Parquet file"),
        (["input={tmp}/bad.jsonl.xz", "tokenizer=bytes"], "cannot be read"),
        (["input={tmp}/broken.jsonl", "tokenizer=bytes", "strict=true"], "not JSON"),
        (["input={tmp}/good.txt", "tokenizer=/no/tokenizer.json"], "cannot be loaded"),
        (["input={tmp}/good.txt", "tokenizer=bpe:12"], "at least 257"),
        (["input={tmp}/good.txt", "tokenizer=bpe:99999999999"], "at most 4,000,000 tokens"),
        (["input={tmp}/good.txt", "tokenizer=bytes", "valid_fraction=2"], "valid_fraction"),
        (["inptu=x", "tokenizer=bytes"], "Unknown argument"),
    ],
)
def test_mistakes_end_in_a_sentence_and_leave_nothing(
    tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "bad.jsonl.xz").write_text("no xz")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{broken\n')
    (tmp_path / "good.txt").write_text("some text")
    out = tmp_path / "out"
    assert main([*(w.format(tmp=tmp_path) for w in words), f"out={out}"]) == 2
    message = capsys.readouterr().err
    assert expected in message and "Traceback" not in message
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_another_input_or_tokenizer_is_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    base = [f"input={tmp_path / 'a.jsonl'}", f"out={tmp_path / 'o'}"]
    assert main([*base, "tokenizer=bytes"]) == 0
    before = contents(tmp_path / "o")
    assert main([*base, "tokenizer=bytes"]) == 0 and contents(tmp_path / "o") == before
    assert main([*base, "tokenizer=bpe:300"]) == 2 and contents(tmp_path / "o") == before
    assert "other text or another tokenizer" in capsys.readouterr().err
    assert main([*base, "tokenizer=bpe:300", "overwrite=true"]) == 0 and contents(tmp_path / "o") != before


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [t * 40 for t in TEXTS] * 6)
    words = ["-m", "data.prepare", f"input={tmp_path / 'a.jsonl'}", "tokenizer=bpe:300", "shard_tokens=20000"]
    assert run_program([*words, f"out={tmp_path / 'whole'}"]).returncode == 0
    slow = "import data.prepare as p, data.encode as e, time; p.COMMIT_SECONDS = 0; e.BATCH_DOCUMENTS = 8; f = p.held_out; p.held_out = lambda *a: (time.sleep(0.1), f(*a))[1]; p.main()"
    process = start_program(["-c", slow, *words[2:], f"out={tmp_path / 'killed'}"])
    journal = tmp_path / "killed.partial" / "journal.json"
    while not (journal.exists() and json.loads(journal.read_text())["consumed"] > 30):
        assert process.runs()
        time.sleep(0.02)
    process.kill(signal.SIGKILL)
    process.wait()
    with open(max((tmp_path / "killed.partial").glob("train-*.bin")), "ab") as file:
        file.write(b"torn")  # what a crash may leave behind the journal
    done = run_program([*words, f"out={tmp_path / 'killed'}"])
    assert done.returncode == 0 and "going on after" in done.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not os.path.exists(tmp_path / "killed.partial")


def test_interrupted_from_the_keyboard_is_a_sentence_and_goes_on(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS * 6)
    words = [f"input={tmp_path / 'a.jsonl'}", "tokenizer=bytes", f"out={tmp_path / 'o'}"]
    slow = "import data.prepare as p, data.encode as e, time, sys; p.COMMIT_SECONDS = 0; e.BATCH_DOCUMENTS = 8; f = p.held_out; p.held_out = lambda *a: (time.sleep(0.1), f(*a))[1]; sys.exit(p.main())"
    # a job in the background of a shell ignores it
    slow = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {slow}"
    process = start_program(["-c", slow, *words])
    while not (tmp_path / "o.partial" / "journal.json").exists():
        assert process.runs()
        time.sleep(0.02)
    process.kill(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130 and "goes on where this one stopped" in done.stderr and "Traceback" not in done.stderr
    assert main(words) == 0 and ShardSet(tmp_path / "o", "train").meta["splits"]["train"]["documents"] > 300


def test_special_tokens_spelt_in_a_text_are_text() -> None:
    from data.tokenizer import encode_bare, eot_id

    for tokenizer in (byte_tokenizer(), train_bpe(["hello world " * 50], 300)):
        ids = encode_bare(tokenizer).encode("a <|endoftext|> b").ids
        assert eot_id(tokenizer) not in ids
        assert tokenizer.decode(ids) == "a <|endoftext|> b"


def test_bytes_round_trip() -> None:
    text = "naïve 漢字 🙂 \x00\n tab\t"
    assert byte_tokenizer().decode(byte_tokenizer().encode(text).ids) == text
