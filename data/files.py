"""Files that are whole or not there: written under a temporary name, then renamed; and a folder that one process has for itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data.errors import UserError, reason_of


def write_bytes(path: Path, data: bytes) -> None:
    """A reader sees the old file or the new one; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # of a full disk, on which it would take room
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write does not say of what


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON; NaN and infinities become null, as JSON has none, and what JSON does not know its text."""
    write_bytes(path, (json.dumps(finite(value), indent=1, default=str) + "\n").encode())


def save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written in place. Raises OSError where the disk does not take it, in the place of safetensors' own error."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def check_absent(folder: Path) -> None:
    """Raises UserError where something lies at `folder` already."""
    if folder.exists():
        raise UserError(f"{folder} exists already; remove it or give another folder.")


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that becomes it when the body has ended well, and is gone when it has not. Raises UserError where `final` exists, and
    in the place of an OSError of the body."""
    check_absent(final)
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, final)
    except OSError as error:
        raise UserError(f"{final} cannot be written: {reason_of(error)}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_report(out: Path, report: Any, page: str = "") -> None:
    """The JSON of a result, and its page, if it has one, beside it as .md. Raises UserError where they cannot be written."""
    try:
        write_json(out, report)
        if page:
            write_bytes(out.with_suffix(".md"), page.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {reason_of(error)}.") from error


def check_writable(folder: Path) -> None:
    """Makes the folder and a file in it that is removed again. Raises UserError where that cannot be done, before work is lost."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); give another folder with out=.") from error


def lock(folder: Path, here: float = 20.0, elsewhere: float = 150.0, key: str = "run_dir") -> IO[str]:
    """Makes `folder` this process's own while the file returned lives; the kernel lets it go when the process ends, however it does.

    Waits seconds for a process of this machine or of another one that is about to end: a disk over the network hears of a dead machine late.
    key: the setting that names the folder. Raises UserError when somebody else has it. A file system without locks gives it to everybody.
    """
    path = folder / "lock"
    file = path.open("a+")
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()  # who had it before has removed it, and another process may have one of its own
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except BlockingIOError:
            file.seek(0)
            owner = file.read().split() or ["another", "machine"]
            if time.monotonic() - start > (here if owner[0] == socket.gethostname() else elsewhere):
                raise UserError(
                    f"{folder} belongs to process {owner[-1]} of {owner[0]}, which still runs; stop it, or give another {key}."
                ) from None
            time.sleep(0.2)
        except OSError:
            return file
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"{socket.gethostname()} {os.getpid()}\n")
        file.flush()
    return file


def finite(value: Any) -> Any:
    """`value` as JSON can say it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
