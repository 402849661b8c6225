"""One clock, one copy bandwidth and one way of writing results for all benches."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import check_writable, write_json
from training.watch.metrics import environment

WARM_UPS = 3
FLUSH, COPIED = 256 << 20, 1 << 30  # bytes: more than any level-2 cache holds, and of a copy
AHEAD = 4_000_000  # cycles the device is kept busy before each run, two milliseconds, so that the host is ahead of it
_unmeasured = False


@contextmanager
def unmeasured() -> Iterator[None]:
    """Inside, whatever is to be timed runs once and counts as a millisecond: kernels are compiled for the measured run."""
    global _unmeasured
    before, _unmeasured = _unmeasured, True
    try:
        yield
    finally:
        _unmeasured = before


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(f: Callable[[], Any], device: torch.device, meet: Callable[[], Any] | None = None) -> float:
    """Of one run by the host's clock, from an idle device to an idle device. meet: what lets several ranks begin together."""
    wait(device)
    if meet is not None:
        meet()
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter() - start


def milliseconds(f: Callable[[], Any], repeats: int = 20, device: torch.device | str = "cuda") -> float:
    """Median time on the device by CUDA events, each run after the level-2 cache was overwritten; on a CPU by the host's clock."""
    device = torch.device(device)
    if _unmeasured:
        f()
        return 1.0
    for _ in range(min(WARM_UPS, repeats)):
        f()
    if device.type != "cuda":
        return 1e3 * statistics.median(seconds(f, device) for _ in range(repeats))
    flush, times = torch.empty(FLUSH, dtype=torch.int8, device=device), []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(AHEAD)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(device: torch.device | str = "cuda") -> float:
    """Bytes a millisecond of a copy, read and write counted: what limits are measured against."""
    device = torch.device(device)
    a = torch.empty(COPIED if device.type == "cuda" else COPIED >> 6, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / milliseconds(lambda: b.copy_(a), device=device)


class Results:
    """What a bench has measured so far, as JSON: the environment, then what is kept. The file is written at every change, whole, so that neither a
    failure nor a later time limit loses a part; each part is on the screen too."""

    def __init__(self, out: Path | None, device: torch.device, **about: Any) -> None:
        if out is not None:
            try:
                check_writable(Path(out).parent)  # before anything is measured
            except UserError as error:
                sys.exit(f"error: {error}")
        self.out, self.began = out, time.monotonic()
        self.values: dict[str, Any] = {**environment(device), **about}

    def elapsed(self) -> float:
        """Seconds since the bench began."""
        return time.monotonic() - self.began

    def keep(self, key: str, value: Any) -> None:
        self.values[key] = value
        self._write(key, value)

    def append(self, key: str, row: Any) -> None:
        """One more of the rows of `key`."""
        self.values.setdefault(key, []).append(row)
        self._write(key, row)

    def quiet(self, key: str, rows: list[Any]) -> None:
        """More rows of `key`, in the file only."""
        self.values.setdefault(key, []).extend(rows)
        if self.out:
            write_json(self.out, self.values)

    def item(self, key: str, name: str, row: Any) -> None:
        """One more of the named items of `key`."""
        self.values.setdefault(key, {})[name] = row
        self._write(name, row)

    def _write(self, key: str, value: Any) -> None:
        if self.out:
            write_json(self.out, self.values)
        print(f"{self.elapsed():.1f} s", key, json.dumps(value, default=str), flush=True)


def attempted(make: Callable[[], Any]) -> Any:
    """What `make` returns, or {"error": one sentence}: the other parts are still wanted."""
    try:
        return make()
    except Exception as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:500]}
