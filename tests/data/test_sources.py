"""What is read of files and folders, and what is said of the rest."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import records
from data.listing import list_files
from data.prepare import main
from data.shards import ShardSet
from data.sources import Source

TEXTS = ["first, with a comma", 'second "quoted"\nand a second line', "dritte mit Ü, \u2028 and 漢字", " fourth; ends in space "]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def table(delimiter: str) -> bytes:
    quoted = [delimiter.join([str(i), '"' + text.replace('"', '""') + '"']) for i, text in enumerate(TEXTS)]
    return ("\r\n".join([f"id{delimiter}text", *quoted]) + "\r\n").encode()


def parquet(texts: list[Any] = TEXTS, name: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(texts))), name: texts}), sink)
    return sink.getvalue().to_pybytes()


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES: dict[str, bytes] = {
    "a.jsonl": LINES,
    "A.JSONL": LINES,
    "b.ndjson": LINES.replace(b"\n", b"\r\n\r\n"),
    "c.json": LINES,
    "d.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "e.json": json.dumps(TEXTS).encode(),
    "f.csv": table(","),
    "g.csv": b"\xef\xbb\xbf" + table(";"),
    "h.tsv": table("\t").replace(b"text", b" text", 1),
    "i.parquet": parquet(),
    "j.jsonl": b"\xef\xbb\xbf" + LINES,
    "k.json": "\ufeff".encode("utf-16-le") + json.dumps(ROWS, ensure_ascii=False).encode("utf-16-le"),
    "l.csv": b"\xff\xfe" + table(",").decode().encode("utf-16-le"),
    "m.jsonl": b"\xfe\xff" + LINES.decode().encode("utf-16-be"),
    "n.json": json.dumps({"a": {"text": TEXTS}}).encode(),
    "o.parquet": parquet([{"text": text} for text in TEXTS], "a"),
    "p.parquet": parquet([[{"n": 1, "text": text} for text in TEXTS], []], "a"),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".ZST": zstd}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(name: str, packer: str, tmp_path: Path) -> None:
    path = tmp_path / (name + packer)
    path.write_bytes(PACKERS[packer](FILES[name]))
    source = Source(str(tmp_path), "a.text" if name[0] in "nop" else "text")
    assert list(source) == TEXTS and not source.bad


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_text_loses_its_mark_of_order_and_nothing_else(encoding: str, tmp_path: Path) -> None:
    text = "line one\r\nÜber\n"
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    assert list(Source(str(tmp_path / "a.txt"))) == [text]


def test_values_of_a_json_file_are_found_wherever_it_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)

    def value(depth: int = 0) -> Any:
        kind = rng.randrange(7 if depth < 3 else 5)
        if kind < 5:
            return [None, rng.randrange(10**6), rng.random(), rng.choice(["", "a]b,{", 'q"\\', "漢🙂"]), True][kind]
        return (
            [value(depth + 1) for _ in range(rng.randrange(4))]
            if kind == 5
            else {f"k{i}": value(depth + 1) for i in range(rng.randrange(4))}
        )

    for block in (1, 2, 7, 1000):
        monkeypatch.setattr(records, "BLOCK", block)
        for _ in range(40):
            values, bad = [value() for _ in range(rng.randrange(5))], list[str]()
            lines = [] if values and isinstance(values[0], list) else ["\n".join(json.dumps(v) for v in values)]  # else it is an array file
            for text in (json.dumps(values), json.dumps(values, indent=1), *lines):
                (tmp_path / "a.json").write_text(text)
                with (tmp_path / "a.json").open() as file:
                    assert list(records._json_values(file, bad.append)) == values, text
            assert not bad
    for broken in ("[1, 2", "[1 2]", '{"text": "a"', "[1, 2,]", "[,]", "nonsense", "[1] [2]"):
        (tmp_path / "a.json").write_text(broken)
        bad = []
        with (tmp_path / "a.json").open() as file:
            list(records._json_values(file, bad.append))
        assert bad == ["not JSON"], broken


def test_a_folder_says_what_is_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for folder in (root / "sub", root / ".ipynb_checkpoints", root / "__MACOSX", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (root / "sub" / "a.TXT").write_text("one")
    (root / "a.txt").write_text("two")  # the same name in another folder
    (elsewhere / "deep" / "b.md").write_text("three")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "sub" / "loop").symlink_to(root / "sub")
    (root / "again.txt").symlink_to(root / "a.txt")
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    for path in (
        ".hidden.txt",
        "._a.parquet",
        ".ipynb_checkpoints/a.txt",
        "__MACOSX/a.txt",
        "picture.png",
        "all.zip",
        "README",
        "x.tar.gz",
    ):
        (root / path).write_text("no")
    os.mkfifo(root / "pipe.txt")
    listing = list_files(str(root))
    assert [str(p.relative_to(root)) for p in listing.files] == ["a.txt", "linked/deep/b.md", "sub/a.TXT"]
    reasons = {reason: [Path(p).name for p in paths] for reason, paths in listing.left_out.items()}
    assert sorted(reasons.pop("hidden")) == sorted([".hidden.txt", "._a.parquet", ".ipynb_checkpoints", "__MACOSX"])
    assert sorted(reasons.pop("link to a folder that is read already")) == ["back", "loop"]
    assert reasons == {
        "link to a file that is read already": ["again.txt"],
        "link to nothing": ["gone.txt"],
        "no regular file that can be opened": ["pipe.txt"],
        "of a kind that is not read (.png)": ["picture.png"],
        "of a kind that is not read (no ending)": ["README"],
        "archive (unpack it)": ["all.zip", "x.tar.gz"],
    }
    assert main([f"input={root}", f"out={tmp_path / 'o'}", "tokenizer=bytes"]) == 0
    said = capsys.readouterr().out
    assert "reading 3 files: 2 .txt, 1 .md" in said and f"left out, of a kind that is not read (.png): {root / 'picture.png'}" in said
    assert f"left out, link to nothing: {root / 'gone.txt'}" in said


def test_a_file_that_two_inputs_have_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "link.txt").symlink_to(folder / "b.txt")
    assert main([f"input={folder},{folder / 'a.txt'},{tmp_path / 'link.txt'}", f"out={tmp_path / 'o'}", "tokenizer=bytes"]) == 0
    said = capsys.readouterr().out
    assert "reading 0 files" not in said and "train: 1 documents" in said and "valid: 1 documents" in said
    assert f"left out, read already by an earlier input: {folder / 'a.txt'}" in said and str(tmp_path / "link.txt") in said
    for twice in (str(folder), "demo", "hf:some/set"):
        assert main([f"input={twice},{twice}", f"out={tmp_path / 'p'}", "tokenizer=bytes"]) == 2
        assert f"input names {twice} twice" in capsys.readouterr().err
    assert main(["input=hf:", f"out={tmp_path / 'p'}", "tokenizer=bytes"]) == 2
    assert "input=hf: names no data set" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_one_bad_file_is_counted_and_named_like_a_bad_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet())
    (folder / "b.parquet").write_bytes(parquet(name="content"))
    (folder / "c.parquet").write_bytes(parquet()[:-20])
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(LINES * 500)[:-30])
    (folder / "e.jsonl.xz").write_text("no xz")
    (folder / "f.txt.zst").write_text("no zst")
    (folder / "g.txt.bz2").write_text("no bz2")
    (folder / "h.txt").write_bytes(b"\xff\xd8\xff\xe0 no text")
    (folder / "i.txt").write_bytes("wide letters without a mark".encode("utf-16-le"))
    (folder / "j.json").write_text('{"body": "x", "title": "y"}')
    (folder / "k.csv").write_text('body,title\n"a","b"\n')
    (folder / "m.csv").write_text("text,id, text\nfirst,1,second\n")
    (folder / "l.csv").write_text('id,text\n1,fine\n2,"bad" quote\n3,good\n4\n')
    assert main([f"input={folder}", f"out={tmp_path / 'o'}", "tokenizer=bytes"]) == 0
    said = capsys.readouterr().out
    fields = "(the fields there are id, content, body, title, 1 of 2 columns; set text_field)"
    assert f"left out, 4 no field 'text' {fields}: first in {folder / 'b.parquet'}" in said
    assert f"left out, 1 not a Parquet file: {folder / 'c.parquet'}" in said and "1 table with 2 columns of the name text" in said
    assert (
        f"left out, 1 row of a table whose quotes do not match: {folder / 'l.csv'}" in said
        and f"left out, 1 no text (it holds zero bytes): {folder / 'i.txt'}" in said
    )
    for name in ("d.jsonl.gz", "e.jsonl.xz", "f.txt.zst", "g.txt.bz2"):
        assert any("file that cannot be read (" in line and line.endswith(str(folder / name)) for line in said.splitlines()), (name, said)
    meta = json.loads((tmp_path / "o" / "meta.json").read_text())
    assert meta["bad_records"]["not UTF-8"] == 1 and len(meta["left_out"]) == 10
    for name, words in (
        ("c.parquet", "cannot be read to its end: not a Parquet file"),
        ("k.csv", "the fields there are body, title; set text_field"),
        ("m.csv", "cannot be read to its end: table with 2 columns of the name text"),
    ):
        assert main([f"input={folder / name}", f"out={tmp_path / 'p'}", "tokenizer=bytes"]) == 2
        assert words in capsys.readouterr().err
    assert main([f"input={folder}", f"out={tmp_path / 'p'}", "tokenizer=bytes", "strict=true"]) == 2
    assert "b.parquet: no field 'text' (the fields there are id, content; set text_field)" in capsys.readouterr().err


def test_a_file_that_was_edited_without_a_change_of_size_is_not_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    file, words = (
        tmp_path / "in" / "a.txt",
        [f"input={tmp_path / 'in'}", f"out={tmp_path / 'o'}", f"tokenizer={tmp_path / 'tokenizer.json'}"],
    )
    from data.tokenizer import byte_tokenizer

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    file.write_text("one text " * 100)
    assert main(words) == 0 and main(words) == 0 and "is already complete" in capsys.readouterr().out
    file.write_text("two text " * 100)
    assert main(words) == 2 and f"({file} was changed since); choose another out, or overwrite=true" in capsys.readouterr().err
    assert main([*words, "overwrite=true"]) == 0
    shards = ShardSet(tmp_path / "o", "train")
    assert shards.tokenizer().decode(shards.document(0)[0].tolist()).startswith("two")
    (tmp_path / "in" / "b.txt").write_text("more")
    assert main(words) == 2 and f"({tmp_path / 'in' / 'b.txt'} is new)" in capsys.readouterr().err
    (tmp_path / "in" / "b.txt").unlink()
    assert main([*words, "valid_fraction=0.5"]) == 2 and "(valid_fraction was 0.01)" in capsys.readouterr().err
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert main(words) == 2 and "tokenizer.json was changed since" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_one_byte_that_is_not_utf_8_costs_its_own_record_alone(name: str, tmp_path: Path) -> None:
    content = FILES[{"a.csv": "f.csv", "a.json": "d.json", "a.jsonl": "a.jsonl"}[name]].replace(b"first", b"fir\xfft")
    (tmp_path / name).write_bytes(content)
    source = Source(str(tmp_path / name))
    assert list(source) == TEXTS[1:] and source.bad == {"not UTF-8": 1}


@pytest.mark.parametrize(
    "name,content,words",
    [
        ("a.zip", b"PK", "is an archive (unpack it)"),
        ("a.png", b"x", "of a kind that is not read (.png)"),
        ("a.gz", b"x", "of a kind that is not read (no ending)"),
        ("x" * 300 + ".txt", None, "There is nothing to read at input="),
        ("empty.txt", b"", "holds no usable text (1 empty"),
        ("a.json", b'{"text": 5}', "holds no usable text (1 field 'text' is not text"),
        ("a.json", b'{"text": "a", "text": "b"}', "holds no usable text (1 field 'text' is there several times"),
        ("a.jsonl", b'{"text": "a", "n": 1, "text": "b"}', "holds no usable text (1 field 'text' is there several times"),
        ("deep.json", b"[" * 100_000, "holds no usable text (1 not JSON"),
        ("list.jsonl", b"[1]", "holds no usable text (1 neither an object nor a text"),
        ("data.json", b'{"data": [{"text": "x"}], "v": 1}', "no field 'text' (the fields there are data.text, v; set text_field)"),
        ("a.parquet", parquet([{"text": "x"}], "data"), "no field 'text' (the fields there are id, data.text; set text_field)"),
        ("a.csv", b"", "holds no usable text"),
        ("b.csv", b"id,body\n1,x\n", "no field 'text' (the fields there are id, body; set text_field)"),
    ],
)
def test_a_file_without_text_ends_in_a_sentence(
    name: str, content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main([f"input={tmp_path / name}", f"out={tmp_path / 'o'}", "tokenizer=bytes"]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_inputs_may_have_commas_and_brackets_in_their_names(tmp_path: Path) -> None:
    for name in ("a,b.txt", "c[1].txt"):
        (tmp_path / name).write_text(name)
        assert main([f"input={tmp_path / name}", f"out={tmp_path / name}.out", "tokenizer=bytes"]) == 0
    # a comma at the end is no other input
    assert main([f"input={tmp_path / 'c[1].txt'},", f"out={tmp_path / 'o'}", "tokenizer=bytes"]) == 0
    assert ShardSet(tmp_path / "o", "train").n_documents == 1


def test_shards_inside_the_folder_that_is_read_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text " * 100)
    words = [f"input={tmp_path}", f"out={tmp_path / 'shards'}", "tokenizer=bytes"]
    assert main(words) == 0 and main(words) == 0  # the second time they lie there
    assert "is already complete" in capsys.readouterr().out
    assert list_files(str(tmp_path)).left_out == {"token shards, which are no text": [str(tmp_path / "shards")]}


@pytest.mark.parametrize(
    "name,words", [("a.txt", "input={} out=runs/data/a"), ("in", "input={} out=runs/data/in"), ("none", "input=demo out={} ")]
)
def test_text_in_the_place_of_shards_is_said_to_be_prepared_first(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in ("a.txt", "in/b.txt"):
        (tmp_path / path).write_text("text")
    with pytest.raises(ValueError, match="holds no token shards; make them with: python -m data.prepare " + words.format(tmp_path / name)):
        ShardSet(tmp_path / name, "train")
