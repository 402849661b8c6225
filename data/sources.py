"""Documents from text, JSON Lines and Parquet files, from `datasets` names, and from the bundled demo corpus.

Records that cannot be used (not UTF-8, no such field, not text, empty) are counted by kind and left out.
"""

from __future__ import annotations

import glob
import gzip
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parent / "demo" / "demo_corpus.jsonl.xz"
ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".json.gz", ".txt.gz", ".txt.xz", ".parquet")


class Source:
    """Iterates over the texts of one input. `bad` counts the records left out by kind; with strict the first one is a ValueError."""

    def __init__(self, spec: str, text_field: str = "text", strict: bool = False) -> None:
        self.spec, self.field, self.strict = spec, text_field, strict
        self.bad: Counter[str] = Counter()

    def _reject(self, kind: str, where: str) -> None:
        if self.strict:
            raise ValueError(f"{where}: {kind}; mend it, or leave out strict=true to count such records and go on.")
        self.bad[kind] += 1

    def __iter__(self) -> Iterator[str]:
        if self.spec.startswith("hf:"):
            yield from self._texts(self._dataset(), self.spec)
            return
        for file in self.files():
            yield from self._file(file)

    def files(self) -> list[Path]:
        """The files behind the spec. Raises ValueError when there are none."""
        if self.spec == "demo":
            return [DEMO]
        path = Path(self.spec)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(ENDINGS))
        else:
            found = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(self.spec, recursive=True) if Path(p).is_file())
        if not found:
            raise ValueError(
                f"There is nothing to read at input={self.spec}; give a file or folder of {', '.join(ENDINGS)}, `demo`, or hf:NAME."
            )
        wrong = [p for p in found if not p.name.endswith(ENDINGS)]
        if wrong:
            raise ValueError(f"{wrong[0]} is of a kind that cannot be read; it must end in {', '.join(ENDINGS)}.")
        return found

    def identity(self) -> list[Any]:
        """What the input is: names and sizes of files, so that a resumed run can tell it is the same."""
        if self.spec.startswith("hf:"):
            return [self.spec, self.field]
        return [self.field, *([str(p.resolve()) if self.spec != "demo" else "demo", p.stat().st_size] for p in self.files())]

    def _file(self, path: Path) -> Iterator[str]:
        try:
            if path.name.endswith(".parquet"):
                yield from self._texts(_parquet_rows(path, self.field), str(path))
            elif ".json" in path.name:
                yield from self._texts(self._json_lines(path), str(path))
            else:
                with _open(path) as file:
                    yield from self._texts(iter([file.read()]), str(path))
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error

    def _json_lines(self, path: Path) -> Iterator[Any]:
        with _open(path) as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError:
                    self._reject("not UTF-8", str(path))
                    continue
                except (ValueError, RecursionError):
                    self._reject("not JSON", str(path))
                    continue
                yield row.get(self.field) if isinstance(row, dict) else None

    def _dataset(self) -> Iterator[Any]:
        import datasets

        name, _, rest = self.spec.removeprefix("hf:").partition(":")
        config, _, split = rest.partition(":")
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except Exception as error:  # datasets raises many kinds; the first line says what is the matter
            raise ValueError(f"The data set {name} cannot be opened: {_first_line(error)}.") from error
        columns = list(rows.features or ())
        if columns and self.field not in columns:
            raise ValueError(f"The data set {name} has no column {self.field!r}; set text_field to one of {', '.join(columns)}.")
        stream = iter(rows.select_columns([self.field]) if columns else rows)
        while True:
            try:
                row = next(stream, None)
            except Exception as error:
                raise ValueError(f"The data set {name} cannot be read on: {_first_line(error)}; the same command goes on here.") from error
            if row is None:
                return
            yield row.get(self.field)

    def _texts(self, values: Iterator[Any], where: str) -> Iterator[str]:
        for value in values:
            if isinstance(value, bytes):
                try:
                    value = value.decode("utf-8")
                except UnicodeDecodeError:
                    self._reject("not UTF-8", where)
                    continue
            if value is None:
                self._reject(f"no field {self.field!r}", where)
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


def _open(path: Path) -> Any:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    return lzma.open(path, "rb") if path.name.endswith(".xz") else open(path, "rb")


def _parquet_rows(path: Path, field: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file.") from error
    if field not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {field!r}; set text_field to one of {', '.join(file.schema_arrow.names)}.")
    try:
        for batch in file.iter_batches(columns=[field], batch_size=1024):
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error)}.") from error
