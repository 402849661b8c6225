"""Which files of an input are read, which are left out, and why: nothing in a folder is passed over without a word."""

from __future__ import annotations

import glob
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
READABLE = f"{', '.join(KINDS)}, each also {', '.join(COMPRESSED)}"
HIDDEN = ("__MACOSX",)  # beside what begins with a dot: what systems and editors put there
NAMED = 3  # paths shown for each reason of leaving files out


def kind_of(path: Path) -> str | None:
    """text, lines, json, table or parquet, whatever the case of its ending; None for a file that is not read."""
    return KINDS.get(ending_of(path))


def ending_of(path: Path) -> str:
    """The ending that says what a file holds, in lower case: .txt of A.TXT.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def shown(path: str | Path) -> str:
    """A path as it can be printed, whatever bytes its name has."""
    return str(path).encode("utf-8", "replace").decode()


@dataclass
class Listing:
    """files: in the order in which they are read. left_out: paths by reason."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave(self, reason: str, path: str | Path) -> None:
        self.left_out.setdefault(reason, []).append(shown(path))

    def sort(self, path: Path) -> None:
        """Takes a file that was found, or leaves it out."""
        if not os.path.isfile(path):
            self.leave("link to nothing" if path.is_symlink() and not os.path.exists(path) else "no regular file that can be opened", path)
        elif kind_of(path) is None:
            ending = ending_of(path)
            self.leave("archive (unpack it)" if ending in ARCHIVES else f"of a kind that is not read ({ending or 'no ending'})", path)
        else:
            self.files.append(path)

    def reading(self) -> str:
        """What is read, in a line."""
        kinds = Counter(ending_of(path) for path in self.files)
        return f"reading {len(self.files):,} file{'s' if len(self.files) != 1 else ''}: " + ", ".join(
            f"{n:,} {e}" for e, n in kinds.most_common()
        )

    def leaving(self) -> list[str]:
        """What is left out, a line for each reason."""
        lines = []
        for reason, paths in sorted(self.left_out.items()):
            more = f" and {len(paths) - NAMED:,} more" if len(paths) > NAMED else ""
            lines.append(f"left out, {reason}: {', '.join(paths[:NAMED])}{more}")
        return lines


def list_files(spec: str) -> Listing:
    """The files of a file name, folder or glob. Raises UserError when there are none, or when the one named is of another kind."""
    listing, path = Listing(), Path(spec)
    if os.path.isdir(path):
        _walk(listing, path)
    elif os.path.exists(path):
        listing.sort(path)
        if not listing.files:
            reason = next(iter(listing.left_out), "no file")
            raise UserError(f"{shown(path)} is {_article(reason)}; give a file that ends in {READABLE}, or a folder of them.")
    else:
        for one in sorted(Path(p) for p in glob.glob(spec, recursive=True)):
            if os.path.isdir(one):
                if "**" not in spec:
                    listing.leave("folder (a pattern takes files; name the folder, or use **)", one)
            else:
                listing.sort(one)
    listing.files.sort()
    if not listing.files:
        why = "; ".join(listing.leaving())
        raise UserError(
            f"There is nothing to read at input={shown(spec)}{f' ({why})' if why else ''}; give a file or folder of {READABLE}, `demo`, or hf:NAME."
        )
    return listing


def _article(reason: str) -> str:
    return f"an {reason}" if reason.startswith("archive") else f"a {reason}" if reason.startswith("link") else reason


def _walk(listing: Listing, root: Path) -> None:
    """All of a folder and of the folders that are linked into it, each once, however they are linked."""
    folders: set[str] = set()
    files: set[str] = set()
    links: list[Path] = []
    waiting = [root]
    while waiting or links:
        top = waiting.pop() if waiting else links.pop(0)
        if os.path.realpath(top) in folders:
            listing.leave("link to a folder that is read already", top)
            continue
        for base, names, members in os.walk(
            top, onerror=lambda error: listing.leave(f"cannot be opened ({error.strerror})", error.filename)
        ):
            real = os.path.realpath(base)
            if real in folders:
                names.clear()
                continue
            folders.add(real)
            if "tokenizer.json" in members and {"meta.json", "identity.json"} & set(members):
                listing.leave("token shards, which are no text", base)
                names.clear()
                continue
            for name in [n for n in names if _hidden(n)]:
                listing.leave("hidden", os.path.join(base, name))
            names[:] = sorted(n for n in names if not _hidden(n))
            links += [Path(base, n) for n in names if os.path.islink(os.path.join(base, n))]
            for name in sorted(members, key=lambda n: (os.path.islink(os.path.join(base, n)), n)):
                path = Path(base, name)
                if _hidden(name):
                    listing.leave("hidden", path)
                elif path.is_symlink():
                    links_to = os.path.realpath(path)
                    if links_to in files:
                        listing.leave("link to a file that is read already", path)
                        continue
                    files.add(links_to)
                    listing.sort(path)
                else:
                    files.add(os.path.join(real, name))
                    listing.sort(path)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN
