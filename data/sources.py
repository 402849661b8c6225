"""Documents from text, JSON, table and Parquet files, from `datasets` names, and from the bundled demo corpus.

Records that cannot be used (not UTF-8, no such field, not text, empty) and files that cannot be read are counted by kind and left out.
"""

from __future__ import annotations

import functools
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.listing import Listing, list_files, shown
from data.records import BadFile, Missing, Twice, column_of, pick, records

DEMO = Path(__file__).parent / "demo" / "demo_corpus.jsonl.xz"
FIELDS = 12  # names of other fields that a message gives


class Source:
    """Iterates over the texts of one input. `bad` counts the records left out by kind, `first` says where the first of each was, `fields`
    what records without the field have; with strict the first one is a ValueError."""

    def __init__(self, spec: str, text_field: str = "text", strict: bool = False) -> None:
        self.spec, self.field, self.strict = spec, text_field, strict
        self.bad: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.fields: dict[str, None] = {}

    def _reject(self, kind: str, where: str) -> None:
        if self.strict:
            raise UserError(f"{where}: {kind}{self.instead()}; mend it, or leave out strict=true to count such records and go on.")
        self.bad[kind] += 1
        self.first.setdefault(kind, where)

    def instead(self) -> str:
        """The fields that records without the field have, for a message."""
        names = list(self.fields)
        return (
            f" (the fields there are {', '.join(names[:FIELDS])}{' ...' if len(names) > FIELDS else ''}; set text_field)" if names else ""
        )

    def __iter__(self) -> Iterator[str]:
        if self.spec.startswith("hf:"):
            yield from self._texts(self._dataset(), self.spec)
            return
        for file in self.files():
            yield from self._file(file)

    @functools.cached_property
    def listing(self) -> Listing:
        """The files behind the spec and those that are left out. Raises UserError when there are none."""
        return Listing([DEMO]) if self.spec == "demo" else list_files(self.spec)

    def files(self) -> list[Path]:
        """The files behind the spec. Raises UserError when there are none."""
        return self.listing.files

    def identity(self) -> list[Any]:
        """What the input is: names, sizes and times of change of files, so that a resumed run can tell in a moment that it is the same."""
        if self.spec.startswith("hf:"):
            return [self.spec, self.field]
        if self.spec == "demo":
            return [self.field, ["demo", DEMO.stat().st_size]]
        return [self.field, *([str(p.resolve()), (status := p.stat()).st_size, status.st_mtime_ns] for p in self.files())]

    def _file(self, path: Path) -> Iterator[str]:
        where = shown(path)
        try:
            yield from self._texts(records(path, self.field, lambda kind: self._reject(kind, where)), where)
        except (BadFile, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
            if getattr(error, "errno", None) and not isinstance(error, PermissionError):  # of the disk, not of the file
                raise UserError(f"{where} cannot be read: {reason}; mend that, and the same command goes on.") from error
            if Path(self.spec) == path:  # all there is
                raise UserError(f"{where} cannot be read to its end: {reason}; fetch or write it again.") from error
            self._reject(reason if isinstance(error, BadFile) else f"file that cannot be read ({reason})", where)

    def _dataset(self) -> Iterator[Any]:
        import datasets

        name, _, rest = self.spec.removeprefix("hf:").partition(":")
        if not name:
            raise UserError(f"input={self.spec} names no data set; write hf:NAME, or hf:NAME:CONFIG:SPLIT.")
        config, _, split = rest.partition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except Exception as error:  # datasets raises many kinds; the first line says what is the matter
            raise UserError(f"The data set {name} cannot be opened: {_first_line(error)}.") from error
        columns = list(rows.features or ())
        column = column_of(self.field, columns)
        if columns and column is None:
            raise UserError(f"The data set {name} has no column {self.field!r}; set text_field to one of {', '.join(columns)}.")
        stream = iter(rows.select_columns([column]) if columns else rows)
        while True:
            try:
                row = next(stream, None)
            except Exception as error:
                raise UserError(f"The data set {name} cannot be read on: {_first_line(error)}; the same command goes on here.") from error
            if row is None:
                return
            yield from pick(row, self.field)

    def _texts(self, values: Iterator[Any], where: str) -> Iterator[str]:
        for value in values:
            if isinstance(value, bytes):
                try:
                    value = value.decode("utf-8")
                except UnicodeDecodeError:
                    self._reject("not UTF-8", where)
                    continue
            if isinstance(value, Missing) and value.names is None:
                self._reject("neither an object nor a text", where)
            elif value is None or isinstance(value, Missing):
                if value is not None and len(self.fields) <= FIELDS:
                    self.fields |= dict.fromkeys(value.names or ())
                self._reject(f"no field {self.field!r}", where)
            elif isinstance(value, Twice):
                self._reject(f"field {self.field!r} is there several times", where)
            elif not isinstance(value, str):
                self._reject(f"field {self.field!r} is not text", where)
            elif not value.strip():
                self._reject("empty", where)
            elif not _encodable(value):
                self._reject("not UTF-8", where)
            else:
                yield value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates, from \ud800 escapes in JSON
        return False
    return True
