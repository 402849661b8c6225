"""The documents of one preparation and the identity of its input, by which a rerun of the same command is told from a different one."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.listing import Listing, shown
from data.sources import Source

INPUTS = "inputs.json"  # beside meta.json: names, sizes and times of the files that were read
LEAST_CUT, LEAST_HELD_OUT = 500, 2000  # characters of a single document that is cut, and of the part that is held out


class Corpus:
    """The documents of all inputs in order, once per iteration."""

    def __init__(self, spec: str, text_field: str = "text", strict: bool = False, limit: int = 0, last_share: float = 0.0) -> None:
        """spec: inputs with commas between them; limit: 0 for all documents; last_share: what of a single document is held out."""
        specs = [spec] if os.path.exists(spec) else [s.strip() for s in spec.split(",") if s.strip()]
        self.sources = [Source(os.path.expanduser(one), text_field, strict) for one in specs]
        self._read_once()
        self.limit, self.last_share = limit, last_share
        self.cut = False  # whether there was a single document, which is given in two parts, the second to be held out

    def _read_once(self) -> None:
        """Leaves out files that an earlier input has: read twice they count twice, and may be trained on and held out. Raises UserError for an input
        that is named twice."""
        twice = [one for one, times in Counter(source.spec for source in self.sources).items() if times > 1]
        if twice:
            raise UserError(f"input names {shown(twice[0])} twice; name it once.")
        read: set[str] = set()
        for listing in self._listings():
            real = {path: os.path.realpath(path) for path in listing.files}
            for path in [path for path in listing.files if real[path] in read]:
                listing.files.remove(path)
                listing.leave("read already by an earlier input", path)
            read.update(real.values())

    def identity(self) -> list[Any]:
        return [source.identity() for source in self.sources]

    def _listings(self) -> list[Listing]:
        return [source.listing for source in self.sources if source.spec != "demo" and not source.spec.startswith("hf:")]

    def reading(self) -> list[str]:
        """What is read, a line each input."""
        return [listing.reading() for listing in self._listings() if listing.files]

    def left_out(self) -> list[str]:
        """The files and records that are not read, and why, a line for each kind."""
        return [line for listing in self._listings() for line in listing.leaving()] + self.bad_told()

    def __iter__(self) -> Iterator[str]:
        documents = self._documents()
        first, second = next(documents, None), next(documents, None)
        self.cut = False
        if first is not None and second is None and (at := cut_of(first, self.last_share)):
            self.cut = True
            first, second = first[:at], first[at:]
        yield from (text for text in (first, second) if text is not None)
        yield from documents

    def _documents(self) -> Iterator[str]:
        count = 0
        for source in self.sources:
            source.bad.clear()
            source.first.clear()
            for text in source:
                if self.limit and count == self.limit:
                    return
                count += 1
                yield text

    @property
    def bad(self) -> Counter[str]:
        return sum((source.bad for source in self.sources), Counter())

    def bad_told(self) -> list[str]:
        """What was left out of the files, a line for each kind."""
        lines = []
        for source in self.sources:
            for kind, count in source.bad.most_common():
                more = source.instead() if kind.startswith("no field") else ""
                lines.append(f"left out, {count:,} {kind}{more}: {'first in ' if count > 1 else ''}{source.first[kind]}")
        return lines


def cut_of(text: str, share: float) -> int:
    """Where a single document is cut: its last `share`, or as much as an evaluation needs, is held out. After a paragraph, line or word; 0 for none."""
    if not share or len(text) < LEAST_CUT:
        return 0
    target = len(text) - max(round(len(text) * share), min(LEAST_HELD_OUT, len(text) // 10))
    for border in ("\n\n", "\n", " "):
        at = text.rfind(border, target - (len(text) - target) // 2, target + 1) + len(border)
        if at >= len(border) and text[:at].strip() and text[at:].strip():
            return at
    return target if text[:target].strip() and text[target:].strip() else 0


def tokenizer_identity(spec: str) -> Any:
    """What identifies the tokenizer: its name and, where it is a file, the content."""
    path = Path(spec) / "tokenizer.json" if Path(spec).is_dir() else Path(spec)
    if not path.is_file():
        return spec
    beside = [path.parent / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    try:
        return [spec, *(hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, *beside) if p.is_file())]
    except OSError as error:
        raise UserError(f"The tokenizer {spec} cannot be read: {error.strerror}.") from error


def change(out: Path, settings: dict[str, Any]) -> str:
    """The first difference between the input or settings of the shards in `out` and those asked for, in brackets; '' if it cannot be
    read."""
    try:
        there = json.loads((out / INPUTS).read_text())
        files = {one[0]: one[1:] for source in there["input"] for one in source if isinstance(one, list)}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    for source in settings["input"]:
        for name, *state in (one for one in source if isinstance(one, list)):
            if files.get(name) != state:
                return f" ({shown(name)} {'was changed since' if name in files else 'is new'})"
    key = next((key for key in settings if key != "input" and there.get(key) != json.loads(json.dumps(settings[key]))), None)
    if key == "tokenizer" and isinstance(settings[key], list) and isinstance(there[key], list) and there[key][0] == settings[key][0]:
        return f" ({shown(settings[key][0])} was changed since)"
    return f" ({key} was {there[key]!r})" if key else " (some of its files are gone)"
