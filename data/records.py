"""The records of one file, of any kind that is read and compressed or not: texts, or values that a Source then judges."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.listing import ending_of, kind_of

BLOCK = 1 << 20
NUMBER = 32  # characters behind a number in which it may go on: 1 and 1.5e-3 begin alike
WHITE = re.compile(r"[ \t\r\n]*")
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
Reject = Callable[[str], None]


class BadFile(Exception):
    """A file that is not what its name says, or ends early; the message is a kind of fault."""


class Twice:
    """Stands for the value of a name that an object has several times: which of its values is meant nobody can say."""


TWICE = Twice()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                made[name] = TWICE
            seen.add(name)
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class Missing:
    """A record without the field; names: the fields it has, None for what is no object with fields."""

    def __init__(self, names: list[str] | None) -> None:
        self.names = names


def open_file(path: Path) -> Any:
    """A binary file of what `path` holds, unpacked."""
    ending = path.suffix.lower()
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(path), compression="zstd", buffer_size=BLOCK))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(ending, open)(path, "rb")


def records(path: Path, field: str, reject: Reject) -> Iterator[Any]:
    """The values of `field` (bytes or str where they are text, Missing where there is none); what is no record goes to `reject` with why.

    Raises BadFile, OSError and the errors of decompression for a file that cannot be read, or not to its end.
    """
    kind = kind_of(path)
    if kind == "parquet":
        yield from parquet_rows(path, field)
        return
    with open_file(path) as file:
        wide = wide_of(file.peek(4))
        if kind == "text":
            yield from _text(file, wide, reject)
            return
        if kind == "lines" and wide is None:
            for line in file:
                yield from json_line(line, field, reject)
            return
        # Bytes that are not UTF-8 become lone surrogates: the texts that hold them are then left out one by one, and not all that follows.
        wrapped = io.TextIOWrapper(file, wide or "utf-8-sig", None if wide else "surrogateescape", newline="" if kind == "table" else "\n")
        try:
            if kind == "table":
                yield from _rows(wrapped, ending_of(path), field, reject)
            else:
                for value in _json_values(wrapped, reject) if kind == "json" else _json_lines(wrapped, reject):
                    yield from pick(value, field)
        except UnicodeError:
            reject(f"not {(wide or 'utf-8').upper()} from some place on")


def wide_of(head: bytes) -> str | None:
    """The UTF-16 or UTF-32 that a byte-order mark at the beginning of a file tells of; None: UTF-8."""
    return next((name for mark, name in MARKS if head.startswith(mark)), None)


def decoded(content: bytes) -> str:
    """A file's text: UTF-8, or what its byte-order mark says, which is none of the text; line ends are as they were. Raises UnicodeDecodeError."""
    return content.decode(wide_of(content) or "utf-8-sig")


def _text(file: Any, wide: str | None, reject: Reject) -> Iterator[Any]:
    content = file.read()
    if wide is None and b"\0" in content[:4096]:
        return reject("no text (it holds zero bytes)")
    try:
        yield decoded(content)
    except UnicodeDecodeError:
        reject(f"not {(wide or 'utf-8').upper()}")


def json_line(line: bytes, field: str, reject: Reject) -> Iterator[Any]:
    """What a line of JSON Lines says; nothing for an empty one."""
    if not line.strip():
        return
    try:
        value = DECODER.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return reject("not UTF-8")
    except (ValueError, RecursionError):
        return reject("not JSON")
    yield from pick(value, field)


def _json_lines(text: Any, reject: Reject) -> Iterator[Any]:
    for line in text:
        if line.strip():
            try:
                yield DECODER.decode(line)
            except (ValueError, RecursionError):
                reject("not JSON")


class _Window:
    """A moving view of a text that is read bit by bit: `left` is unread from `at` on, and `more` appends the next block."""

    def __init__(self, text: Any) -> None:
        self.text, self.left, self.at, self.ended, self.size = text, "", 0, False, BLOCK

    def more(self) -> None:
        block = self.text.read(self.size)
        self.left, self.at, self.ended = self.left[self.at :] + block, 0, not block

    def peek(self) -> str:
        """The next character that is not white; '' at the end."""
        while True:
            self.at = WHITE.match(self.left, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.left) or self.ended:
                return self.left[self.at : self.at + 1]
            self.more()

    def value(self) -> Any:
        """The next JSON value. Raises ValueError."""
        self.size = BLOCK
        while True:
            try:
                value, end = DECODER.raw_decode(self.left, self.at)
                near = len(self.left) - end < NUMBER if isinstance(value, (int, float)) else False
                if not near or self.ended:
                    self.at = end
                    return value
            except ValueError:
                if self.ended:
                    raise
                self.size *= 2  # a long value is not tried again after every block
            self.more()


def _json_values(text: Any, reject: Reject) -> Iterator[Any]:
    """The values of a .json file: the elements of an array, or one value after another as in JSON Lines. One at a time is kept whole."""
    window = _Window(text)
    try:
        if window.peek() != "[":
            while window.peek():
                yield window.value()
            return
        window.at += 1
        if window.peek() == "]":
            return
        while True:
            yield window.value()
            mark = window.peek()
            if mark == "]":
                window.at += 1
                return reject("not JSON") if window.peek() else None
            if mark != ",":
                return reject("not JSON")
            window.at += 1
            window.peek()
    except UnicodeError:
        raise
    except (ValueError, RecursionError):
        reject("not JSON")


def pick(value: Any, field: str) -> Iterator[Any]:
    """`field` of a record; a.b goes into objects and through lists. A record that is a string is its own text."""
    if isinstance(value, str):
        yield value
    elif not isinstance(value, dict):
        yield Missing(None)
    elif field in value:
        yield value[field]
    elif "." in field and (parts := field.split("."))[0] in value:
        items: list[Any] = [value]
        for part in parts:
            items = [item for one in items for item in (one if isinstance(one, list) else [one])]
            items = [
                one[part] if isinstance(one, dict) and part in one else Missing(list(one) if isinstance(one, dict) else None)
                for one in items
            ]
            if any(isinstance(one, Missing) for one in items):
                break
        yield from (item for one in items for item in (one if isinstance(one, list) else [one]))
    else:
        yield Missing([f"{name}.{field}" if _holds(one, field) else name for name, one in value.items()])


def _holds(value: Any, field: str) -> bool:
    """Whether an object, or the first of a list, has the field."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and field in first


def _rows(file: Any, ending: str, field: str, reject: Reject) -> Iterator[Any]:
    """The column `field` of a table whose first line names its columns; between them a comma, in .tsv a tab, or else what the first line has."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    head = file.readline().lstrip("\ufeff")
    names, delimiter = [], ","
    for delimiter in ("\t",) if ending == ".tsv" else (",", ";", "\t", "|"):
        names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
        if field in names:
            break
    else:
        names = next(csv.reader([head], delimiter="\t" if ending == ".tsv" else ","), [])
        if head.strip():
            yield Missing([name.strip() for name in names])
        return
    if names.count(field) > 1:
        raise BadFile(f"table with {names.count(field)} columns of the name {field}")
    column, rows = names.index(field), csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows, None)
        except csv.Error:
            reject("row of a table whose quotes do not match")
            continue
        if row is None:
            return
        if row:
            yield row[column] if len(row) == len(names) else Missing([f"{len(row)} of {len(names)} columns"])


def column_of(field: str, columns: list[str]) -> str | None:
    """The column that holds `field`, which is one itself or lies inside of one, as a.b; None where there is none."""
    return next((name for name in (field, field.split(".")[0]) if name in columns), None)


def _has(kind: Any, field: str) -> bool:
    """Whether structs of an Arrow type, or those in its lists, have the field."""
    inner = getattr(kind, "value_type", kind)
    return hasattr(inner, "get_field_index") and inner.get_field_index(field) >= 0


def parquet_rows(path: Path, field: str) -> Iterator[Any]:
    """The column `field`, a batch at a time; a.b goes into structs and through lists. Raises BadFile."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = str(path)
    if path.suffix.lower() != ".parquet":
        with open_file(path) as packed:
            source = pa.BufferReader(packed.read())
    try:
        file = pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise BadFile("not a Parquet file") from error
    schema = file.schema_arrow
    column = column_of(field, schema.names)
    if column is None:
        yield Missing([f"{one.name}.{field}" if _has(one.type, field) else one.name for one in schema])
        return
    try:
        for batch in file.iter_batches(columns=[column], batch_size=1024):
            for value in batch.column(0).to_pylist():
                yield from [value] if column == field else pick({column: value}, field)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            raise
        raise BadFile("Parquet file that is damaged") from error
