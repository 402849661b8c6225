"""Numbers in a shard's files, read by position.

A memory map would kill the process without a word (SIGBUS) when its file is cut while it is read; here the same is a ValueError. Files are
opened when they are needed and a limited number is kept open, so that a folder may have more of them than a process may hold.
"""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError

OPEN_FILES = 128
BLOCK = 512  # entries of an index between two that are kept in memory: a page of 4 KiB
BLOCKS = 1024  # the blocks read last


class Files:
    """The open files and newest blocks of one shard set; a file that is closed to make room stays open for a thread that reads it."""

    def __init__(self) -> None:
        self.open = functools.lru_cache(maxsize=OPEN_FILES)(io.FileIO)
        self.block = functools.lru_cache(maxsize=BLOCKS)(Numbers.read_block)


class Numbers:
    """`count` numbers of one type in a file. Raises UserError when it is missing, of another size, or (while reading) cut or lost."""

    def __init__(self, files: Files, path: Path, count: int, dtype: np.dtype[Any]) -> None:
        self.files, self.path, self.name, self.count, self.dtype = files, path, str(path), count, dtype
        try:
            size = os.stat(path).st_size
        except OSError:
            size = -1
        if size != count * dtype.itemsize:
            what = "is missing" if size < 0 else f"has {size:,} bytes instead of {count * dtype.itemsize:,}"
            raise UserError(f"The shard {path} {what}; copy it again or prepare the data again.")
        if count:
            try:
                self.files.open(self.name)
            except OSError as error:
                raise UserError(f"The shard {path} cannot be read: {error.strerror}.") from error

    def read(self, start: int, n: int) -> np.ndarray:
        """Numbers start .. start+n-1, a new array."""
        result = np.empty(n, self.dtype)
        left, place = result.data.cast("B") if n else memoryview(b""), start * self.dtype.itemsize
        try:
            while left:
                file = self.files.open(self.name)
                done = os.preadv(file.fileno(), [left], place)
                if not done:
                    size = os.fstat(file.fileno()).st_size
                    raise UserError(
                        f"The shard {self.path} was changed during the run and has {size:,} bytes now; put it back and run again."
                    )
                left, place = left[done:], place + done
        except OSError as error:
            raise UserError(f"The shard {self.path} was lost during the run ({error.strerror}); put it back and run again.") from None
        return result

    def read_block(self, b: int) -> np.ndarray:
        """Numbers bBLOCK .. (b+1)BLOCK-1, as far as there are any."""
        return self.read(b * BLOCK, min(BLOCK, self.count - b * BLOCK))

    def at(self, i: int) -> int:
        """The i-th number. Its whole block is read and remembered, since neighbours are usually asked for next."""
        return int(self.files.block(self, i // BLOCK)[i % BLOCK])


class Index(Numbers):
    """Rising numbers that are searched: every BLOCK-th stays in memory, so that a search reads one block from the file."""

    @functools.cached_property
    def sparse(self) -> np.ndarray:
        """Every BLOCK-th number."""
        step = BLOCK << 10
        parts = [self.read(first, min(step, self.count - first))[::BLOCK] for first in range(0, self.count, step)]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def between(self, low: int, high: int) -> np.ndarray:
        """The numbers from low up to, not including, high."""
        ends = np.array([low, high], self.dtype)  # numpy would copy the searched array to compare it with another type
        first, last = self.sparse.searchsorted(ends).tolist()
        first = max(0, first - 1)
        if last - first == 1:
            numbers = self.files.block(self, first)
        else:
            numbers = self.read(first * BLOCK, min(self.count, last * BLOCK) - first * BLOCK)
        a, b = numbers.searchsorted(ends).tolist()
        return numbers[a:b]

    def holder(self, values: np.ndarray) -> np.ndarray:
        """(int64) Place of the last number that is not above each of `values`; -1 for none."""
        values = values.astype(self.dtype)
        block = self.sparse.searchsorted(values, side="right") - 1
        result = np.full(len(values), -1, dtype=np.int64)
        for b in np.unique(block[block >= 0]).tolist():
            chosen = block == b
            result[chosen] = b * BLOCK + self.files.block(self, b).searchsorted(values[chosen], side="right") - 1
        return result
